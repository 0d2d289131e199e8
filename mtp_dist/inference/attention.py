"""Attention of several query heads to the keys and values that they share, without copies of these."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_SDPA = "grouped_sdpa"
"""Its name as transformers' `attn_implementation`."""


def grouped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Return the attention output `[B, q, heads, head_dim]` for a query `[B, heads, q, head_dim]`.

    transformers' own SDPA repeats keys and values for every query head if there is a mask, which takes longer than the
    attention. Here the query heads of a group are further rows of queries instead.
    """
    groups = int(module.num_key_value_groups)  # type: ignore[arg-type]
    if attention_mask is None or groups == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batch, heads, length, width = query.shape
    rows = query.reshape(batch, heads // groups, groups * length, width)
    mask = attention_mask.repeat(1, 1, groups, 1)
    output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=kwargs.get("scaling"))
    return output.reshape(batch, heads, length, width).transpose(1, 2), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
