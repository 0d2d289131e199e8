"""What a user may write about the heads, and the sentence that he gets when keys contradict each other."""

import json
from typing import Any

import pytest

from mtp_dist.config import HeadsConfig, build_config
from mtp_dist.errors import ConfigError
from tests.tiny import tiny_config


def message_of(heads: dict[str, Any], **sections: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        tiny_config(heads=heads, **sections)
    return str(error.value)


# The tiny configuration has 4 heads and 20 steps.
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"repeated": True},
        "heads.repeated = true shares the block of kind 'sequential', heads.kind is 'parallel': remove it",
    ),
    (
        {"layers_per_head": 2, "kind": "linear"},
        "heads.layers_per_head = 2 does not go with heads.kind = 'linear', which has no transformer layers: remove it",
    ),
    (
        {"layers_per_head": 3, "kind": "mlp"},
        "heads.layers_per_head = 3 does not go with heads.kind = 'mlp', which has no transformer layers: remove it",
    ),
    (
        {"kind": "anticausal", "detach": True},
        "heads.detach = true does not go with heads.kind = 'anticausal': head 1 reaches the trunk through all other "
        "heads, so their gradient cannot be stopped before it",
    ),
    (
        {"kind": "anticausal", "schedule": "forward"},
        "heads.schedule = 'forward' does not go with heads.kind = 'anticausal': head 1 reads the trunk through all "
        "other heads, so none of them can be left out",
    ),
    (
        {"count": 1, "distillation": 0.5},
        "heads.distillation teaches the heads from head 2 on, heads.count is 1: remove it",
    ),
    (
        {"count": 1, "auxiliary_weight": 0.3},
        "heads.auxiliary_weight weighs the heads from head 2 on, heads.count is 1: remove it",
    ),
    (
        {"schedule": "forward", "loss_weights": [0, 1, 1, 1]},
        "heads.schedule = 'forward' has a stage with head 1 alone, whose heads.loss_weights is 0: give it a weight "
        "above 0",
    ),
    (
        {"kind": "anticausal", "distillation": 0.5},
        "heads.distillation does not go with heads.kind = 'anticausal': head 1, which teaches the others, is the last "
        "to run",
    ),
    (
        {"loss_mode": "naive", "distillation": 0.5},
        "heads.distillation does not go with heads.loss_mode = 'naive', which lacks it: use 'eager' or 'recompute'",
    ),
    (
        {"loss_mode": "naive", "token_order": 0.5},
        "heads.token_order does not go with heads.loss_mode = 'naive', which lacks it: use 'eager' or 'recompute'",
    ),
    (
        {"loss_mode": "naive", "schedule": "reverse"},
        "heads.schedule does not go with heads.loss_mode = 'naive', which lacks it: use 'eager' or 'recompute'",
    ),
    (
        {"loss_mode": "naive", "chunk_tokens": 64},
        "heads.chunk_tokens has no effect with heads.loss_mode = 'naive': remove it or use 'eager' or 'recompute'",
    ),
    (
        {"prediction_distances": [1, 3]},
        "heads.prediction_distances = [1, 3] has 2 numbers, heads.count is 4: give one per head",
    ),
    (
        {"prediction_distances": [2, 3, 4, 5]},
        "heads.prediction_distances = [2, 3, 4, 5] must increase from 1: head 1 predicts the next token",
    ),
    (
        {"prediction_distances": [1, 3, 3, 5]},
        "heads.prediction_distances = [1, 3, 3, 5] must increase from 1: head 1 predicts the next token",
    ),
    (
        {"kind": "sequential", "prediction_distances": [1, 3, 5, 7]},
        "heads.prediction_distances = [1, 3, 5, 7] does not go with heads.kind = 'sequential', whose blocks read every "
        "token up to their target: remove it",
    ),
    (
        {"loss_weights": [1, 1, 1, 1], "auxiliary_weight": 0.3},
        "heads.loss_weights and heads.auxiliary_weight each say how the losses are weighed: keep one",
    ),
    (
        {"auxiliary_weight": 0, "loss_decay": 0.3},
        "heads.auxiliary_weight and heads.loss_decay each say how the losses are weighed: keep one",
    ),
    ({"loss_weights": [1, 2]}, "heads.loss_weights has 2 numbers, heads.count is 4: give one per head"),
    (
        {"loss_weights": [0, 0, 0, 0]},
        "heads.loss_weights are all 0: nothing would be trained, give at least one head a weight above 0",
    ),
    (
        {"loss_weights": [0, 1, 1, 1], "detach": True},
        "heads.detach = true leaves the trunk to head 1 alone, whose heads.loss_weights is 0: nothing would train the "
        "trunk, give it a weight above 0",
    ),
    (
        {"loss_weights": [0, 1, 1, 1], "distillation": 0.5},
        "heads.distillation teaches from head 1, whose heads.loss_weights is 0 so that it never learns: give it a "
        "weight above 0",
    ),
    *(
        (
            {**weights, "distillation": 0.5},
            "heads.distillation is part of the losses of heads 2..n, whose weights are all 0: give one of them a "
            "weight above 0 or remove heads.distillation",
        )
        for weights in ({"loss_weights": [1, 0, 0, 0]}, {"auxiliary_weight": 0})
    ),
    (
        {"distillation_top": 5},
        "heads.distillation_top has no effect without heads.distillation: give it a weight or remove the key",
    ),
    (
        {"token_order_window": 5},
        "heads.token_order_window has no effect without heads.token_order: give it a weight or remove the key",
    ),
    (
        {"prediction_distances": [1, 2, 3, 17]},
        "the last of heads.prediction_distances, 17, looks further ahead than a sample is long, "
        "train.sequence_length = 16: lower it or train on longer samples",
    ),
    ({"auxiliary_weight": [[2, 0.3]]}, "heads.auxiliary_weight has the steps [2]: they must increase from 1"),
    (
        {"auxiliary_weight": [[1, 0.3], [9, 0.1], [9, 0.2]]},
        "heads.auxiliary_weight has the steps [1, 9, 9]: they must increase from 1",
    ),
    (
        {"auxiliary_weight": [[1, 0.3], [9, 0.1], [5, 0.2]]},
        "heads.auxiliary_weight has the steps [1, 9, 5]: they must increase from 1",
    ),
    (
        {"count": 21, "schedule": "reverse"},
        "heads.schedule = 'reverse' has heads.count = 21 stages, train.steps = 20 are fewer: train for longer or use "
        "fewer heads",
    ),
]


@pytest.mark.parametrize(("heads", "sentence"), CONTRADICTIONS, ids=lambda x: str(x)[:60])
def test_keys_that_contradict_each_other(heads: dict[str, Any], sentence: str) -> None:
    assert message_of(heads) == sentence


def test_tied_embeddings_and_separate_unembeddings() -> None:
    assert message_of({"unembedding": "separate"}, model={"tie_embeddings": True}).startswith(
        "model.tie_embeddings = true ties the embedding to the one unembedding that all heads share"
    )


def test_every_contradiction_has_its_line() -> None:
    lines = message_of({"kind": "anticausal", "detach": True, "distillation": 1.0, "loss_mode": "naive"}).splitlines()
    assert len(lines) == 3 and all(line.startswith(("heads.detach", "heads.distillation")) for line in lines)


WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    (
        {"auxiliary_weight": "x"},
        "heads.auxiliary_weight = 'x' is wrong: it should be a valid number, or it should be a list",
    ),
    (
        {"auxiliary_weight": -1},
        "heads.auxiliary_weight = -1 is wrong: it should be greater than or equal to 0, or it should be a list",
    ),
    (
        {"auxiliary_weight": True},
        "heads.auxiliary_weight = True is wrong: it should be a valid number, or it should be a list",
    ),
    (
        {"auxiliary_weight": {"a": 1}},
        "heads.auxiliary_weight = {'a': 1} is wrong: it should be a valid number, or it should be a list",
    ),
    ({"auxiliary_weight": []}, "heads.auxiliary_weight = [] is wrong: it should be a valid number, or it is too short"),
    ({"auxiliary_weight": [[1, "x"]]}, "heads.auxiliary_weight.0.1 = 'x' is wrong: it should be a valid number"),
    ({"auxiliary_weight": [[1.5, 0.3]]}, "heads.auxiliary_weight.0.0 = 1.5 is wrong: it should be a valid integer"),
    ({"auxiliary_weight": [[0, 0.3]]}, "heads.auxiliary_weight.0.0 = 0 is wrong: it should be greater than 0"),
    ({"auxiliary_weight": [[1, 0.3, 4]]}, "heads.auxiliary_weight.0 = [1, 0.3, 4] is wrong: it is too long"),
    ({"auxiliary_weight": [[1, 0.3], 0.1]}, "heads.auxiliary_weight.1 = 0.1 is wrong: it should be a list"),
    ({"auxiliary_weight": [[1]]}, "heads.auxiliary_weight.0.1 is missing: give it a value"),
    ({"prediction_distances": "x"}, "heads.prediction_distances = 'x' is wrong: it should be a list"),
    ({"prediction_distances": 3}, "heads.prediction_distances = 3 is wrong: it should be a list"),
    (
        {"prediction_distances": [1, "x", 5, 7]},
        "heads.prediction_distances.1 = 'x' is wrong: it should be a valid integer",
    ),
    (
        {"prediction_distances": [1, 3.0, 5, 7]},
        "heads.prediction_distances.1 = 3.0 is wrong: it should be a valid integer",
    ),
    ({"prediction_distances": [0, 1, 2, 3]}, "heads.prediction_distances.0 = 0 is wrong: it should be greater than 0"),
    ({"loss_decay": 0}, "heads.loss_decay = 0 is wrong: it should be greater than 0"),
    (
        {"kind": "serial"},
        "heads.kind = 'serial' is wrong: it should be 'parallel', 'causal', 'anticausal', 'linear', 'mlp' or "
        "'sequential'",
    ),
    ({"distillation_top": 0}, "heads.distillation_top = 0 is wrong: it should be greater than 0"),
]


@pytest.mark.parametrize(("heads", "sentence"), WRONG_VALUES, ids=lambda x: str(x)[:60])
def test_wrong_values(heads: dict[str, Any], sentence: str) -> None:
    assert message_of(heads) == sentence


GOOD: list[dict[str, Any]] = [
    *({"kind": kind} for kind in ("parallel", "causal", "anticausal", "linear", "mlp", "sequential")),
    {"kind": "sequential", "repeated": True, "layers_per_head": 2, "detach": True, "unembedding": "separate"},
    {"kind": "sequential", "prediction_distances": [1, 2, 3, 4]},
    {"prediction_distances": [1, 3, 5, 7], "schedule": "forward", "loss_weights": [1, 0.5, 0, 0.25]},
    {"auxiliary_weight": 0.3, "schedule": "reverse", "kind": "causal"},
    {"auxiliary_weight": [[1, 0.3], [10, 0]], "token_order": 0.5, "token_order_window": 8, "kind": "anticausal"},
    {"loss_decay": 0.6, "distillation": 1, "distillation_top": 7, "token_order": 1, "z_loss": 1e-4, "detach": True},
    {"count": 1, "prediction_distances": [1], "schedule": "forward"},
    {"loss_weights": [0, 0, 0, 0], "token_order": 1},
]


@pytest.mark.parametrize("heads", GOOD, ids=str)
def test_round_trip_through_json(heads: dict[str, Any]) -> None:
    """As a checkpoint stores it."""
    config = tiny_config(heads=dict(heads))
    again = build_config(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == build_config(config.model_dump()) and again.model_dump() == config.model_dump()
    dumped = config.heads.model_dump(mode="json")
    assert {key: dumped[key] for key in heads} == heads


def test_what_follows_from_the_keys() -> None:
    assert HeadsConfig().distances == (1, 2, 3, 4) and HeadsConfig().lookahead == 4
    leaps = HeadsConfig(prediction_distances=(1, 3, 5, 7), token_order_window=9)
    assert leaps.distances == (1, 3, 5, 7) and leaps.lookahead == 7, "nothing asks for the order"
    assert HeadsConfig(token_order=0.5, token_order_window=9).lookahead == 9
    assert HeadsConfig(token_order=0.5, token_order_window=2).lookahead == 4
    blocks = {"parallel": 4, "causal": 4, "anticausal": 4, "linear": 4, "mlp": 3, "sequential": 3}
    for kind, number in blocks.items():
        heads = HeadsConfig.model_validate({"kind": kind})
        assert heads.blocks == number
        assert heads.block_layers == (0 if kind in ("linear", "mlp") else 1)
