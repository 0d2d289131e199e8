"""The weighted sum of hidden states and its gradients equal fp64 up to one rounding of the result."""

import pytest
import torch
from torch import Tensor

from mtp_dist.model.layers import transformer_config
from mtp_dist.model.parameters import STATE_WEIGHTS, initial_weight
from mtp_dist.model.trunk import HiddenStateWeights, add_weighted
from tests.errors import norm_error
from tests.tiny import tiny_config


def gradients(logits: Tensor, states: list[Tensor], grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Return the sum of the states in plain PyTorch, and the gradients of logits and states."""
    leaves = [logits.requires_grad_(), *(state.requires_grad_() for state in states)]
    total = torch.einsum("l,lsbd->sbd", logits.softmax(0), torch.stack(states))
    return total.detach(), list(torch.autograd.grad(total, leaves, grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_and_gradients_are_rounded_once(dtype: torch.dtype) -> None:
    """States that differ little, as those of consecutive layers: the gradient of a logit is what they differ by."""
    config, generator = tiny_config(), torch.Generator().manual_seed(0)
    weights = HiddenStateWeights(config, transformer_config(config))
    with torch.no_grad():
        weights.logits.copy_(initial_weight(config, STATE_WEIGHTS, (5,)))
    common, grad = torch.randn(2, 16, 4, 32, generator=generator)
    states = [(common + 0.1 * torch.randn(common.shape, generator=generator)).to(dtype) for _ in range(5)]
    grad = (grad + common).to(dtype)
    truth, expected = gradients(weights.logits.detach().double(), [s.double() for s in states], grad.double())

    values, total = weights(), None
    for state, value in zip(states, values, strict=True):
        total = add_weighted(total, state.requires_grad_(), value)
    assert total is not None and total.dtype == dtype
    found = torch.autograd.grad(total, [weights.logits, *states], grad)
    rounding = torch.finfo(dtype).eps
    assert norm_error(total.detach(), truth) < rounding
    scale = (total.detach().double() * truth).sum() / truth.square().sum()
    assert abs(scale - 1) < 3e-4, "roundings of elements cancel, one of a weight does not"
    assert norm_error(found[0], expected[0]) < 1e-4, "fp32 weights leave 1e-3"
    for gradient, wanted in zip(found[1:], expected[1:], strict=True):
        assert gradient.dtype == dtype and norm_error(gradient, wanted) < rounding
