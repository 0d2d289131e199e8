"""Head 1's most probable tokens as soft targets of the other heads.

MTP-D (arXiv:2603.23911) has the cross-entropy to them, Bebop (arXiv:2606.12370) the total variation distance.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_dist.loss.objective import SoftTargets, Vocabulary


class Teacher:
    """Head 1's predictions at each position of a micro-batch, without gradients."""

    def __init__(self, length: int, batch: int, top: int, vocabulary: Vocabulary, device: torch.device) -> None:
        """Reserve memory for the `top` most probable tokens at `length` positions of `batch` samples."""
        self.batch, self.vocabulary = batch, vocabulary
        self.top = min(top, vocabulary.size)
        self.token_ids = torch.zeros(length * batch, self.top, dtype=torch.int64, device=device)
        self.probabilities = torch.zeros(length * batch, self.top, device=device)

    def record(self, positions: slice, logits: Tensor) -> None:
        """Keep the best of head 1's logits `[C, V/TP]`. A collective over the ranks of the vocabulary."""
        group, local_vocab_size = self.vocabulary.group, logits.shape[1]
        best, local = logits.topk(min(self.top, local_vocab_size), 1)
        token_ids = local + group.rank() * local_vocab_size
        if group.size() > 1:
            best, token_ids = _gathered(best, group), _gathered(token_ids, group)
            best, columns = best.topk(self.top, 1)
            token_ids = token_ids.gather(1, columns)
        self.token_ids[positions], self.probabilities[positions] = token_ids, best.float().softmax(1)

    def soft_targets(self, distance: int, valid: Tensor) -> SoftTargets:
        """Return the soft targets of a head that predicts `distance` ahead: head 1's, `distance` - 1 positions later.

        valid `[S * B]`: True if the head has a target. The last positions have no later one and get no soft target.
        """
        later = min((distance - 1) * self.batch, len(self.probabilities))
        probabilities = torch.zeros_like(self.probabilities)
        probabilities[: len(probabilities) - later] = self.probabilities[later:]
        return SoftTargets(self.token_ids.roll(-later, 0), probabilities * valid.unsqueeze(1))


def _gathered(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the columns `[C, N]` of all ranks next to each other: `[C, ranks * N]`."""
    gathered = local.new_empty(group.size() * len(local), local.shape[1])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1)
