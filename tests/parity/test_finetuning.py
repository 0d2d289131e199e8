"""A new run from the weights of another model, on prompts and completions, equals the reference at each layout."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.data.datasets import load_datasets
from mtp_dist.model.parameters import initial_weight
from mtp_dist.model.reference import ReferenceModel, reference_losses
from mtp_dist.model.targets import IGNORE_INDEX
from tests.parity.comparison import Layout
from tests.parity.resuming import ALL, ONE, PIPELINE, TENSOR, at
from tests.ranks import Ranks
from tests.unit.convert.folders import VOCAB_SIZE, write_model


class Start(NamedTuple):
    """What one rank saw of the start of a run."""

    weights: dict[str, Tensor]
    """This stage's full weights before the first step."""
    validation: tuple[float | None, ...]
    losses: tuple[float | None, ...]
    """Losses of the first step."""
    grad_norm: float
    updates: int
    """Updates of the optimizer after that step."""


def start_run(config: Config) -> Start:
    """Take the first step of a new run, on each rank."""
    from mtp_dist.checkpoint.restore import load_initial_weights
    from mtp_dist.convert.initial_weights import find_initial_weights
    from mtp_dist.data.dataloader import Batches
    from mtp_dist.engine.tensor_shards import full_tensors, master_weight
    from mtp_dist.loss.schedule import head_schedule
    from mtp_dist.model.parameters import parameter_shapes
    from tests.engines import open_engine

    engine, datasets = open_engine(config, initialize=False), load_datasets(config)
    load_initial_weights(engine, find_initial_weights(engine.config, datasets.tokenizer).open())
    tensors = full_tensors(engine.stage, parameter_shapes(config), engine.topology, master_weight)
    weights = {name: weight.clone() for name, weight in tensors}
    batches, schedule = Batches(config, engine.topology, datasets), head_schedule(config, 1)
    validation = engine.evaluate(batches.validation_batch(datasets.validation[0].samples), schedule)
    step = engine.train_step(batches.next_train_batch(), 1, 1e-3, schedule)
    batches.close()
    return Start(weights, validation.losses, step.heads.losses, step.grad_norm, engine.optimizer_updates)


def marked_targets(marked: Tensor, heads: int, length: int) -> Tensor:
    """Return targets by hand: of head k at position t the token t + k, unless it is of a prompt."""
    targets = torch.full((heads, len(marked), length), IGNORE_INDEX)
    for head in range(heads):
        for row, tokens in enumerate(marked.tolist()):
            for t, token in enumerate(tokens[head + 1 : head + 1 + length]):
                targets[head, row, t] = token if token >= 0 else IGNORE_INDEX
    return targets


def reference(model: ReferenceModel, marked: Tensor) -> tuple[Tensor, float]:
    """Return the loss of each head, in fp64, and the norm of their sum's gradient."""
    targets = marked_targets(marked, model.config.heads.count, model.config.train.sequence_length)
    counts = (targets != IGNORE_INDEX).sum((1, 2))
    samples = torch.where(marked < 0, -1 - marked, marked)
    losses = reference_losses(model, samples, targets, torch.zeros_like(samples), counts).losses
    model.zero_grad()
    losses.sum().backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters() if weight.grad is not None]).norm()
    return losses.detach(), float(norm)


@pytest.mark.parametrize(
    ("layout", "heads", "source", "train"),
    [
        (ONE, 1, "checkpoint", {}),
        (TENSOR, 4, "fp32", {"low_rank": {"rank": 2}}),
        (PIPELINE, 5, "bf16", {}),
        (ALL, 2, "checkpoint", {}),
        (PIPELINE, 5, "fp32", {"freeze": ["trunk"]}),
    ],
    ids=str,
)
def test_new_run_from_weights(
    ranks: Ranks, tmp_path: Path, layout: Layout, heads: int, source: str, train: dict[str, Any]
) -> None:
    trained = write_model(tmp_path / "checkpoint", heads={"count": 4}).named_weights()
    if source != "checkpoint":
        export_checkpoint(tmp_path / "checkpoint", tmp_path / source, source)
    records = [{"ask": f"{i * 7 % 10}+{i}=", "answer": f"{i * 7 % 10 + i}" * (1 + i % 4)} for i in range(90)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sets: dict[str, Any] = {key: [{"path": str(tmp_path / "sums.jsonl")}] for key in ("train", "validation")}
    config = at(
        layout,
        tmp_path / "new",
        int(layout == ALL),
        model={"vocab_size": VOCAB_SIZE},
        heads={"count": heads},
        data=sets | {"prompt_field": "ask", "completion_field": "answer"},
        train={"validation_samples": 7} | train,
    )
    checkpoint = config.checkpoint.model_copy(update={"initial_weights": str(tmp_path / source)})
    config = config.model_copy(update={"checkpoint": checkpoint})
    starts = ranks.run(layout.world_size, start_run, config)

    weights = {name: weight for start in starts for name, weight in start.weights.items()}
    for name, weight in weights.items():
        expected = trained[name].detach() if name in trained else initial_weight(config, name, tuple(weight.shape))
        rounded = expected.bfloat16().float() if source == "bf16" and name in trained else expected
        assert torch.equal(weight, rounded), name
    new = {name for name in weights if name.startswith("heads.5") or ".lora_" in name}
    assert {name for name in weights if name not in trained} == new
    assert ("heads.2.0.mlp.linear_fc1.weight" in weights) == (heads > 1)

    model = ReferenceModel(config, weights).double()
    datasets = load_datasets(config)
    validation = torch.stack([torch.from_numpy(sample) for sample in datasets.validation[0].samples])
    first_batch = torch.from_numpy(datasets.train.read(0, config.train.global_batch_size))
    for start in starts:
        for found, marked in ((start.validation, validation), (start.losses, first_batch)):
            losses, norm = reference(model, marked)
            torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), losses, rtol=1e-5, atol=0)
        assert start.grad_norm == pytest.approx(norm, rel=1e-5) and start.updates == 1
