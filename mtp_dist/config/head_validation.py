"""Settings of the section `heads` that are incompatible."""

from collections.abc import Iterator
from itertools import pairwise

from mtp_dist.config.base import invalid_steps, messages_if
from mtp_dist.config.heads import HeadsConfig


def incompatible_head_settings(
    heads: HeadsConfig,
    hidden_size: int,
    tie_embeddings: bool,
    steps: int,
    sequence_length: int,
    freezes_trunk: bool,
    pipeline: int,
    dualpipev: bool,
) -> Iterator[str]:
    """Yield one message per pair of settings that are incompatible."""
    if tie_embeddings and heads.unembedding == "separate":
        yield (
            "model.tie_embeddings = true ties the embedding to the one unembedding that all heads share: use "
            "heads.unembedding = 'shared' or set model.tie_embeddings = false"
        )
    if heads.loss_mode == "naive" and heads.chunk_tokens:
        yield "heads.chunk_tokens has no effect with heads.loss_mode = 'naive': remove it or use 'eager' or 'recompute'"
    yield from _incompatible_with_kind(heads)
    yield from _incompatible_condition(heads, hidden_size)
    yield from _incompatible_auxiliary_losses(heads, freezes_trunk)
    yield from _incompatible_distances(heads, sequence_length)
    yield from _incompatible_loss_weights(heads, steps)
    if freezes_trunk:
        yield from _incompatible_with_frozen_trunk(heads, pipeline)
    if heads.stages > 1:
        yield from _incompatible_with_stages(heads, pipeline, dualpipev)


def _incompatible_with_kind(heads: HeadsConfig) -> Iterator[str]:
    detach = str(heads.detach).lower()
    yield from messages_if(
        (
            heads.repeated and not heads.traits.repeatable,
            f"heads.repeated = true shares the block of kind 'sequential', heads.kind is '{heads.kind}': remove it",
        ),
        (
            heads.layers_per_head > 1 and not heads.traits.has_layers,
            f"heads.layers_per_head = {heads.layers_per_head} is incompatible with heads.kind = '{heads.kind}', which "
            "has no transformer layers: remove it",
        ),
        (
            heads.layers_per_head == 0 and (heads.kind != "parallel" or heads.unembedding != "separate"),
            f"heads.layers_per_head = 0 needs heads.kind = 'parallel' and heads.unembedding = 'separate', they are "
            f"'{heads.kind}' and '{heads.unembedding}': nothing else would tell the heads apart",
        ),
        (
            heads.weighted_hidden_states and heads.count == 1,
            "heads.weighted_hidden_states = true is the input of the heads from head 2 on, heads.count is 1: remove it",
        ),
        (
            heads.weighted_hidden_states and heads.traits.reads != "trunk",
            f"heads.weighted_hidden_states = true is incompatible with heads.kind = '{heads.kind}', whose later heads "
            "read another head, not the trunk: use 'parallel', 'linear' or 'mlp'",
        ),
        (
            heads.traits.reads == "next head" and heads.detach,
            f"heads.detach = {detach} is incompatible with heads.kind = '{heads.kind}': head 1 reaches the trunk "
            "through all other heads, so their gradient cannot be stopped before it",
        ),
        (
            heads.traits.reads == "next head" and heads.schedule != "constant",
            f"heads.schedule = '{heads.schedule}' is incompatible with heads.kind = '{heads.kind}': head 1 reads the "
            "trunk through all other heads, so none of them can be left out",
        ),
    )


def _incompatible_condition(heads: HeadsConfig, hidden_size: int) -> Iterator[str]:
    given = f"heads.condition = '{heads.condition}'"
    yield from messages_if(
        (
            heads.condition != "none" and heads.traits.reads != "trunk",
            f"{given} is for heads that read the trunk only (kind 'parallel', 'linear' or 'mlp'), heads.kind is "
            f"'{heads.kind}': remove it",
        ),
        (
            heads.condition != "none" and heads.count == 1,
            f"{given} changes the heads from head 2 on, heads.count is 1: remove it",
        ),
        (
            heads.condition == "none" and heads.condition_rank is not None,
            f"heads.condition_rank = {heads.condition_rank} has no effect without heads.condition: set it to "
            "'previous_token' or remove the key",
        ),
        (
            heads.condition != "none" and (heads.condition_rank or 0) >= hidden_size,
            f"heads.condition_rank = {heads.condition_rank} is not below model.hidden_size = {hidden_size}: lower it",
        ),
    )


def _incompatible_auxiliary_losses(heads: HeadsConfig, freezes_trunk: bool) -> Iterator[str]:
    yield from messages_if(
        (
            heads.distillation_top != HeadsConfig().distillation_top
            and not (heads.distillation or heads.total_variation),
            "heads.distillation_top has no effect without heads.distillation or heads.total_variation: give one of "
            "them a weight or remove the key",
        ),
        (
            heads.token_order_window != HeadsConfig().token_order_window and not heads.token_order,
            "heads.token_order_window has no effect without heads.token_order: give it a weight or remove the key",
        ),
    )
    for key in ("distillation", "total_variation"):
        if getattr(heads, key):
            yield from _incompatible_distillation(heads, f"heads.{key}", freezes_trunk)
    used = {key: getattr(heads, key) for key in ("distillation", "total_variation", "token_order")}
    for key in [key for key, weight in used.items() if weight] + ["schedule"] * (heads.schedule != "constant"):
        if heads.loss_mode == "naive":
            yield (
                f"heads.{key} is incompatible with heads.loss_mode = 'naive', which lacks it: use 'eager' or "
                "'recompute'"
            )


def _incompatible_distillation(heads: HeadsConfig, key: str, freezes_trunk: bool) -> Iterator[str]:
    """Yield one message per setting that is incompatible with a loss to head 1's distribution. key: its weight."""
    if heads.count == 1:
        yield f"{key} trains the heads from head 2 on, heads.count is 1: remove it"
        return
    yield from messages_if(
        (
            heads.traits.reads == "next head",
            f"{key} is incompatible with heads.kind = '{heads.kind}': head 1, the teacher of the others, is the last "
            "to run",
        ),
        (
            heads.loss_weights and not heads.loss_weights[0] and not freezes_trunk,
            f"{key} has head 1 as its teacher, whose heads.loss_weights is 0, so that it never learns: give it a "
            "weight above 0",
        ),
        (
            _later_weights_are_0(heads),
            f"{key} is part of the losses of heads 2..n, whose weights are all 0: give one of them a weight above 0 or "
            f"remove {key}",
        ),
    )


def _incompatible_distances(heads: HeadsConfig, sequence_length: int) -> Iterator[str]:
    distances = heads.distances
    key = f"heads.prediction_distances = {list(distances)}"
    if len(distances) != heads.count:
        yield f"{key} has {len(distances)} numbers, heads.count is {heads.count}: give one per head"
    if distances[0] != 1 or any(later <= earlier for earlier, later in pairwise(distances)):
        yield f"{key} must increase from 1: head 1 predicts the next token"
    elif heads.prediction_distances and distances[-1] > sequence_length:
        yield (
            f"the last of heads.prediction_distances, {distances[-1]}, exceeds the length of a sample, "
            f"train.sequence_length = {sequence_length}: lower it or train on longer samples"
        )
    elif heads.traits.embeds_tokens and distances != tuple(range(1, len(distances) + 1)):
        yield (
            f"{key} is incompatible with heads.kind = '{heads.kind}', whose blocks read every token up to their "
            "target: remove it"
        )


def _incompatible_loss_weights(heads: HeadsConfig, steps: int) -> Iterator[str]:
    given = [key for key in ("loss_weights", "auxiliary_weight", "loss_decay") if getattr(heads, key) is not None]
    if len(given) > 1:
        yield f"{' and '.join(f'heads.{key}' for key in given)} all set the weights of the losses: keep one"
    weights, detach = heads.loss_weights, str(heads.detach).lower()
    yield from messages_if(
        (
            weights is not None and len(weights) != heads.count,
            f"heads.loss_weights has {len(weights or ())} numbers, heads.count is {heads.count}: give one per head",
        ),
        (
            weights is not None and not any(weights) and not heads.token_order,
            "heads.loss_weights are all 0: nothing would be trained, give at least one head a weight above 0",
        ),
        (
            weights and not weights[0] and any(weights) and heads.detach,
            f"heads.detach = {detach} leaves the trunk to head 1 alone, whose heads.loss_weights is 0: nothing would "
            "train the trunk, give it a weight above 0",
        ),
        (
            heads.auxiliary_weight is not None and heads.count == 1,
            "heads.auxiliary_weight is the weight of the heads from head 2 on, heads.count is 1: remove it",
        ),
        (
            heads.schedule != "constant" and weights and not weights[0],
            f"heads.schedule = '{heads.schedule}' has a stage with head 1 alone, whose heads.loss_weights is 0: give "
            "it a weight above 0",
        ),
        (
            heads.schedule != "constant" and steps < heads.count,
            f"heads.schedule = '{heads.schedule}' has heads.count = {heads.count} stages, train.steps = {steps} are "
            "fewer: train for longer or use fewer heads",
        ),
    )
    yield from invalid_steps("heads.auxiliary_weight", heads.auxiliary_weight)


def _later_weights_are_0(heads: HeadsConfig) -> bool:
    """Return whether no loss of heads 2..n counts."""
    return heads.auxiliary_weight == 0 or (heads.loss_weights is not None and not any(heads.loss_weights[1:]))


def _incompatible_with_frozen_trunk(heads: HeadsConfig, pipeline: int) -> Iterator[str]:
    key, detach = "train.freeze = [trunk]", str(heads.detach).lower()
    yield from messages_if(
        (
            heads.traits.reads == "next head",
            f"{key} is incompatible with heads.kind = '{heads.kind}': head 1 reads the trunk through all other heads, "
            "so its predictions would change: use another kind",
        ),
        (
            heads.count == 1 and not heads.token_order,
            f"{key} freezes head 1, heads.count is 1: nothing would be trained, raise heads.count",
        ),
        (
            heads.count > 1 and _later_weights_are_0(heads) and not heads.token_order,
            f"{key} freezes head 1, and the loss weights of heads 2..n are all 0: nothing would be trained, give one "
            "of them a weight above 0",
        ),
        (
            heads.stages > 1,
            f"{key} is incompatible with heads.stages = {heads.stages}: only the last stage runs a backward pass on a "
            "frozen trunk, set it to 1",
        ),
        (
            heads.detach,
            f"heads.detach = {detach} has no effect with {key}, to which no head passes a gradient: remove it",
        ),
        (
            heads.schedule != "constant",
            f"heads.schedule = '{heads.schedule}' has a stage with head 1 alone, which {key} freezes: use 'constant'",
        ),
        (
            heads.weighted_hidden_states and pipeline > 1,
            f"heads.weighted_hidden_states = true with {key} needs parallel.pipeline = 1, it is {pipeline}: the "
            "weights of the hidden states learn on all stages, of which only the last one runs a backward pass on a "
            "frozen trunk",
        ),
    )


def _incompatible_with_stages(heads: HeadsConfig, pipeline: int, dualpipev: bool) -> Iterator[str]:
    key = f"heads.stages = {heads.stages}"
    yield from messages_if(
        (heads.stages > heads.count, f"{key} exceeds heads.count = {heads.count}: each of these stages needs a head"),
        (
            heads.stages > pipeline,
            f"{key} exceeds parallel.pipeline = {pipeline}: lower it or use more pipeline stages",
        ),
        (
            heads.traits.reads != "trunk",
            f"{key} is incompatible with heads.kind = '{heads.kind}', whose heads read each other: only 'parallel', "
            "'linear' and 'mlp' heads can be on different stages",
        ),
        (
            dualpipev,
            f"{key} is incompatible with parallel.schedule = 'dualpipev', which starts the backward passes from one "
            "loss on rank 0: use '1f1b'",
        ),
        (
            heads.loss_mode == "naive",
            f"{key} is incompatible with heads.loss_mode = 'naive', a reference: use 'recompute' or 'eager'",
        ),
        (
            heads.condition != "none",
            f"{key} is incompatible with heads.condition = '{heads.condition}', whose embedding heads 2..n share: "
            "remove one of them",
        ),
        (
            heads.weighted_hidden_states,
            f"{key} is incompatible with heads.weighted_hidden_states = true: only the trunk's output reaches all of "
            "these stages, remove one of them",
        ),
    )
    for name in ("distillation", "total_variation"):
        if getattr(heads, name):
            yield f"{key} is incompatible with heads.{name}, for which head 1 and the others share a stage: remove one"
    if heads.token_order:
        yield f"{key} is incompatible with heads.token_order, an additional loss of head 1's stage: remove one of them"
