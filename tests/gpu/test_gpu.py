"""Kernels, NCCL and a deterministic resume on NVIDIA GPUs. Skipped on other machines."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mtp_dist.loss.linear_cross_entropy import GradientBuffers, linear_cross_entropy
from mtp_dist.loss.objective import HeadSums, Vocabulary
from mtp_dist.model.targets import IGNORE_INDEX
from tests.errors import norm_error
from tests.integration import jobs
from tests.unit.data.test_dataloader import batches_of, config_of

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="PyTorch finds no NVIDIA GPU on this machine")]
ON_GPU = ["env", "DS_ACCELERATOR=cuda"]
"""The jobs of other tests run on the CPU."""
two_gpus = [pytest.mark.multi_gpu, pytest.mark.skipif(GPUS < 2, reason=f"needs 2 NVIDIA GPUs, this machine has {GPUS}")]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_loss_kernel_equals_autograd_in_fp64(dtype, bound):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(size, 64, generator=generator).to(dtype).cuda() for size in (300, 5000))
    targets = torch.randint(0, 5000, (300,), generator=generator).cuda()
    buffers = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    request = GradientBuffers(torch.tensor(0.5, device="cuda"), 0.0, *buffers)
    vocabulary = Vocabulary(5000, IGNORE_INDEX, dist.ProcessGroup(0, 1))
    sums = torch.zeros(len(HeadSums.COLUMNS), device="cuda")
    linear_cross_entropy(hidden, weight, targets, vocabulary, sums, 64, request)
    exact_hidden, exact_weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    truth = F.cross_entropy(exact_hidden @ exact_weight.T, targets, reduction="sum")
    (0.5 * truth).backward()
    assert abs(float(sums[0]) / float(truth.detach()) - 1) < 1e-6
    assert norm_error(request.hidden, exact_hidden.grad) <= bound
    assert norm_error(request.weight, exact_weight.grad) <= bound


def test_train_batches_are_in_pinned_memory():
    batches = batches_of(config_of(4, 2, attention_across_documents=False), device=torch.device("cuda", 0))
    micro_batch = batches.next_train_batch().micro_batches[0]
    batches.close()
    assert all(tensor.is_pinned() for tensor in micro_batch if tensor is not None)
    for copy, tensor in zip(micro_batch.to(torch.device("cuda")), micro_batch, strict=True):
        assert torch.equal(copy.cpu(), tensor)


LAYOUTS = [
    pytest.param(1, [], id="one GPU"),
    pytest.param(2, ["parallel.tensor=2", "parallel.sequence=true"], marks=two_gpus, id="tensor 2"),
    pytest.param(2, ["parallel.pipeline=2"], marks=two_gpus, id="pipeline 2"),
    pytest.param(2, ["parallel.zero_stage=1"], marks=two_gpus, id="data 2"),
]


@pytest.mark.parametrize(("processes", "overrides"), LAYOUTS)
def test_parity_with_the_reference(tmp_path, processes, overrides):
    """Compare fp32 and bf16 with NCCL, PyTorch's attention and the machine's optimizer."""
    config = jobs.write_config(tmp_path, run={"device": "cuda"}, train={"precision": "bf16", "sequence_length": 128})
    arguments = ["-m", "mtp_dist.cli", "selfcheck", "--config", str(config), "--json", *overrides]
    result = jobs.run([*ON_GPU, *jobs.torchrun(*arguments, processes=processes)], status=0)
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["passed"] and {row["precision"] for row in report["comparisons"]} == {"fp32", "bf16"}


def test_resumed_run_is_bitwise_identical(tmp_path):
    """With `train.deterministic`, 6 steps equal 3 steps that are resumed up to step 6."""
    learned = {}
    for name, parts in {"whole": [6], "resumed": [3, 6]}.items():
        (tmp_path / name).mkdir()
        train = {"deterministic": True, "precision": "bf16", "validate_every": 3}
        others = {"optimizer": {"schedule": "constant"}, "checkpoint": {"allow_changes": ["train.steps"]}}
        config = jobs.write_config(tmp_path / name, run={"device": "cuda"}, train=train, **others)
        for steps in parts:
            command = jobs.plain(jobs.PRETRAIN, "--config", str(config), f"train.steps={steps}")
            jobs.run([*ON_GPU, *command], status=0)
        learned[name] = jobs.learned(tmp_path / name / "out")
    assert [line["step"] for line in learned["whole"]] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert learned["resumed"] == learned["whole"]


NCCL_PROGRAM = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from mtp_dist.distributed.flight_recorder import dump_flight_recorder, enable_flight_recorder

enable_flight_recorder()
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(4, device="cuda"))
torch.cuda.synchronize()
print(dump_flight_recorder(Path(sys.argv[1])))
dist.destroy_process_group()
"""


def test_flight_recorder_has_nccl_collectives(tmp_path):
    path = tmp_path / "rank_00000"
    result = jobs.run([*ON_GPU, *jobs.plain("-c", NCCL_PROGRAM, str(path))], status=0)
    assert result.stdout.startswith("nccl:all_reduce, number ") and path.stat().st_size > 0
