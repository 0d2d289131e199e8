"""Norms of hidden states in bf16 have the gradients of fp64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtp_dist.model.layers import NORMS
from tests.errors import norm_error


@pytest.mark.parametrize("name", NORMS)
def test_gradients_do_not_depend_on_the_number_of_positions(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden, grad = (torch.randn(4096, 1, 32, generator=generator).bfloat16() for _ in range(2))
    config: Any = SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=False)
    norm, exact = (NORMS[name](config, 32, 1e-5) for _ in range(2))
    results = []
    for module, dtype in ((norm, torch.bfloat16), (exact.double(), torch.float64)):
        inputs = hidden.detach().to(dtype).requires_grad_()
        output = module(inputs)
        output.backward(grad.to(dtype))
        results.append([output, inputs.grad, *(param.grad for param in module.parameters())])
    for computed, expected in zip(*results, strict=True):
        assert norm_error(computed, expected) <= 4e-3
