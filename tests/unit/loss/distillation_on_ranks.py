"""What the tests of the distillation run on every rank."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_dist.config import Config


@dataclass
class TeacherCase:
    logits: Tensor
    """`[T, V]` over the real vocabulary."""
    top: int
    chunk_tokens: int


def teachings(config: Config, cases: list[TeacherCase]) -> list[tuple[Tensor, Tensor]]:
    """The entries and probabilities that a teacher keeps of each case."""
    from mtp_dist.config.schema import padded_vocab_size
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology, tp_group
    from mtp_dist.loss.distillation import Teacher
    from mtp_dist.loss.linear_cross_entropy import Vocabulary
    from mtp_dist.model.targets import IGNORE_INDEX

    initialize_topology(config, select_device(config))
    group = tp_group()
    answers = []
    for case in cases:
        tokens, vocab_size = case.logits.shape
        missing = padded_vocab_size(vocab_size, group.size()) - vocab_size
        # Padding as the kernel hides it.
        padded = F.pad(case.logits, (0, missing), value=torch.finfo(case.logits.dtype).min)
        mine = padded.chunk(group.size(), 1)[group.rank()]
        teacher = Teacher(tokens, 1, case.top, Vocabulary(vocab_size, IGNORE_INDEX, group), mine.device)
        for start in range(0, tokens, case.chunk_tokens):
            part = slice(start, start + case.chunk_tokens)
            teacher.look(part, mine[part])
        answers.append((teacher.entries, teacher.probabilities))
    return answers
