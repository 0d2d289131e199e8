"""Packed linear layers compute what PyTorch's do."""

import pytest
import torch

from mtp_dist.inference import packing
from mtp_dist.inference.packing import PackedLinear, can_pack, pack_linear_layers
from mtp_dist.inference.speculation import Speculation
from tests.unit.inference.models import TRUNKS, VARIANTS, padded_prompts, tiny_model

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="PyTorch has no oneDNN on this machine")


@pytest.mark.parametrize("variant", [*VARIANTS, *TRUNKS])
def test_the_same_text(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MIN_WEIGHTS", 0)
    model = tiny_model(variant).model
    prompts, mask = padded_prompts([7, 3, 1])

    def texts() -> list[torch.Tensor]:
        return [
            model.generate(
                prompts, attention_mask=mask, max_new_tokens=24, do_sample=False, speculation=Speculation(heads=heads)
            )
            for heads in (1, 4)
        ]

    expected = texts()
    pack_linear_layers(model)
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert all(map(torch.equal, texts(), expected))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_any_layout(dtype: torch.dtype, bias: bool) -> None:
    if not can_pack(torch.zeros(1, dtype=dtype)):
        pytest.skip("this processor has no bf16 multiplications")
    linear = torch.nn.Linear(48, 100, bias, dtype=dtype)
    packed = PackedLinear(linear)
    hidden = torch.randn(3, 5, 48, dtype=dtype)
    with torch.inference_mode():
        for x in (hidden, hidden[:, 2], hidden[:, 1:2], hidden[:, :0], hidden.transpose(0, 1)):
            found, expected = packed(x), linear(x)
            assert found.shape == expected.shape and found.dtype == dtype
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype is torch.float32 else 2e-2)
