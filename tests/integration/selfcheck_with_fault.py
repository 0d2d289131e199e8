"""`mtp-dist` with a norm that forgets to sum its weight's gradient over the tensor-parallel ranks."""

import torch.nn.functional as F

from mtp_dist import cli
from mtp_dist.model.layers import RMSNorm

if __name__ == "__main__":
    RMSNorm.forward = lambda self, hidden: F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
    cli.main()
