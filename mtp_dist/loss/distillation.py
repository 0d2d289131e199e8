"""Head 1's most probable tokens as soft targets for the other heads (MTP-D, arXiv:2603.23911)."""

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_dist.loss.linear_cross_entropy import SoftTargets, Vocabulary


class Teacher:
    """What head 1 says of each position of a micro-batch; nothing of it is differentiated."""

    def __init__(self, length: int, batch: int, top: int, vocabulary: Vocabulary, device: torch.device) -> None:
        """For `length` positions of `batch` samples, the `top` most probable tokens of each."""
        self.batch, self.vocabulary = batch, vocabulary
        self.top = min(top, vocabulary.size)
        self.entries = torch.zeros(length * batch, self.top, dtype=torch.int64, device=device)
        self.probabilities = torch.zeros(length * batch, self.top, device=device)

    def look(self, part: slice, logits: Tensor) -> None:
        """Keep the best of head 1's logits `[C, V/TP]`. All ranks of the vocabulary must call it."""
        group, rows = self.vocabulary.group, logits.shape[1]
        best, local = logits.topk(min(self.top, rows), 1)
        entries = local + group.rank() * rows
        if group.size() > 1:
            best, entries = _gathered(best, group), _gathered(entries, group)
            best, places = best.topk(self.top, 1)
            entries = entries.gather(1, places)
        self.entries[part], self.probabilities[part] = entries, best.float().softmax(1)

    def soft_targets(self, distance: int, valid: Tensor) -> SoftTargets:
        """For a head that predicts `distance` ahead: what head 1 says `distance` - 1 positions later.

        valid `[S * B]`: where the head has a target at all. The last positions have no later one, and no soft target.
        """
        later = min((distance - 1) * self.batch, len(self.probabilities))
        probabilities = torch.zeros_like(self.probabilities)
        probabilities[: len(probabilities) - later] = self.probabilities[later:]
        return SoftTargets(self.entries.roll(-later, 0), probabilities * valid.unsqueeze(1))


def _gathered(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[C, N]` of each rank side by side: `[C, ranks * N]`."""
    everywhere = local.new_empty(group.size() * len(local), local.shape[1])
    dist.all_gather_into_tensor(everywhere, local.contiguous(), group=group)
    return everywhere.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1)
