"""What ranks do together with plain Python values."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from mtp_dist.errors import ConfigError, UserError

T = TypeVar("T")


def from_rank_0(action: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Call `action` on rank 0 only and return its result, which must survive pickling, on every rank.

    A collective over `group`, all ranks. Raise ConfigError on every rank if the action does.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0, group=group)
    result, wrong = answer
    if wrong is not None:
        raise ConfigError(wrong)
    return result
