"""What an export and an import keep in memory is about one tensor, not the model."""

import gc
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest

from mtp_dist.convert.from_huggingface import import_llama
from mtp_dist.convert.import_config import ImportRequest
from mtp_dist.convert.to_huggingface import export_checkpoint
from tests.unit.convert.folders import write_checkpoint

PEAK_CAN_BE_RESET = os.access("/proc/self/clear_refs", os.W_OK)


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process grows at most during `run`, mapped files included."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    run()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024 - before


def growth_of_export(folder: Path, dtype: str) -> int:
    return peak_growth(lambda: export_checkpoint(folder / "c", folder / "hf", dtype))


def growth_of_import(folder: Path) -> int:
    return peak_growth(lambda: import_llama(ImportRequest(folder / "hf", folder / "back")))


@pytest.mark.skipif(not PEAK_CAN_BE_RESET, reason="only Linux resets the peak of a process")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_export_and_an_import_keep_about_one_tensor(tmp_path: Path, dtype: str) -> None:
    shape = {"hidden_size": 512, "trunk_layers": 5, "num_attention_heads": 8, "ffn_hidden_size": 1536}
    model = write_checkpoint(tmp_path / "c", model=shape, heads={"count": 7})
    tensors = [weight.nbytes for weight in model.named_weights().values()]
    del model
    assert sum(tensors) > 140e6 and max(tensors) < 7e6
    bound = 4 * max(tensors) + 8e6
    # Of a new process: the heap of one that has run many tests is in pieces and grows by more than is kept.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        export = fresh.submit(growth_of_export, tmp_path, dtype).result()
        assert export < bound, f"{export / 1e6:.1f} MB"
        back = fresh.submit(growth_of_import, tmp_path).result()
        assert back < bound, f"{back / 1e6:.1f} MB"
