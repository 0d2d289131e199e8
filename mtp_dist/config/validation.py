"""Settings that are incompatible with each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from mtp_dist.config.base import StepValues, invalid_steps, messages_if, value_at_step
from mtp_dist.config.head_validation import incompatible_head_settings
from mtp_dist.config.model import incompatible_model_settings
from mtp_dist.config.schema import Config, DataConfig, LogConfig, ModelPart, SourceConfig
from mtp_dist.config.synthetic import SYNTHETIC_PREFIX

DERIVED_DEEPSPEED_KEYS = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping bf16 fp16 "
    "data_types communication_data_type zero_optimization zero_allow_untested_optimizer pipeline steps_per_print "
    "optimizer scheduler".split()
)


def incompatible_settings(config: Config) -> Iterator[str]:
    """Yield one message per pair of settings that are incompatible."""
    model, heads, parallel, train = config.model, config.heads, config.parallel, config.train
    yield from incompatible_model_settings(model)
    for key, value in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_query_groups", model.query_groups),
        ("model.ffn_hidden_size", model.ffn_size),
    ):
        yield from _indivisible(key, value, "parallel.tensor", parallel.tensor)
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence = true needs parallel.tensor above 1: it shards over the tensor-parallel ranks"
    if parallel.sequence:
        yield from _indivisible("train.sequence_length", train.sequence_length, "parallel.tensor", parallel.tensor)
    yield from _incompatible_parallelism(config)
    yield from _incompatible_profile(config.log, train.steps)
    if config.checkpoint.keep_every and not config.checkpoint.keep_last:
        yield (
            f"checkpoint.keep_every = {config.checkpoint.keep_every} needs checkpoint.keep_last: without that every "
            "checkpoint is kept"
        )
    if train.spike_rollback and train.spike_deviations is None:
        yield "train.spike_rollback = true needs train.spike_deviations: without it nothing is a spike"
    if train.spike_rollback and train.freezes_trunk:
        yield (
            "train.spike_rollback = true reacts to the loss of head 1, which train.freeze = [trunk] freezes: remove it"
        )
    if config.checkpoint.initial_weights and config.checkpoint.resume not in ("auto", "none"):
        yield (
            f"checkpoint.initial_weights = '{config.checkpoint.initial_weights}' starts a new run, checkpoint.resume = "
            f"'{config.checkpoint.resume}' continues one: remove one of them"
        )
    yield from _incompatible_sources(config.data)
    yield from _incompatible_fields(config.data)
    yield from incompatible_head_settings(
        heads,
        model.hidden_size,
        model.tie_embeddings,
        train.steps,
        train.sequence_length,
        train.freezes_trunk,
        parallel.pipeline,
        parallel.schedule == "dualpipev",
    )
    if max(config.optimizer.betas) >= 1:
        yield f"optimizer.betas = {list(config.optimizer.betas)} must lie below 1"
    yield from _incompatible_multipliers(config)
    yield from _incompatible_low_rank(config)
    for owned in sorted(DERIVED_DEEPSPEED_KEYS & config.deepspeed.keys()):
        yield f"deepspeed.{owned} is derived from the other sections: remove it"


def _incompatible_low_rank(config: Config) -> Iterator[str]:
    low_rank, heads, width = config.train.low_rank, config.heads, config.model.hidden_size
    if low_rank is None:
        return
    yield from messages_if(
        (
            config.train.freezes_trunk,
            "train.freeze = [trunk] keeps the trunk as it is, train.low_rank adapts it: remove one of them; the "
            "trunk's own weights are frozen with train.low_rank too",
        ),
        (
            low_rank.rank > width,
            f"train.low_rank.rank = {low_rank.rank} exceeds model.hidden_size = {width}, the largest rank that a "
            "matrix of a layer has: lower it",
        ),
        (
            heads.traits.reads == "next head",
            f"train.low_rank is incompatible with heads.kind = '{heads.kind}': head 1 reads the trunk through all "
            "other heads, which are trained in full: use another kind",
        ),
        (
            heads.stages > 1,
            f"train.low_rank is incompatible with heads.stages = {heads.stages}: what the heads' stages share is "
            "frozen, set it to 1",
        ),
        (
            config.parallel.schedule == "1f1b"  # with dualpipev the rank of the first stage has the heads to train
            and (
                config.parallel.pipeline > config.model.trunk_layers + 1
                or (config.parallel.pipeline > 1 and config.parallel.partition[:1] == (0,))
            ),
            "train.low_rank freezes the embedding, so the first pipeline stage needs a trunk layer to train: lower "
            "parallel.pipeline or give it a layer in parallel.partition",
        ),
    )


def _incompatible_multipliers(config: Config) -> Iterator[str]:
    """Yield a message per invalid key of optimizer.multipliers or, if all are valid, per step that trains nothing."""
    optimizer, untrained = config.optimizer, _untrained_parts(config)
    messages = []
    for part, factor in optimizer.multipliers.items():
        key = f"optimizer.multipliers.{part}"
        if part in untrained:
            messages.append(f"{key} has no effect, {untrained[part]}: remove it")
        elif isinstance(factor, tuple):
            messages += [*invalid_steps(key, factor)] or _never_above_0(key, factor, config.train.steps)
    factors = (factor for factor in optimizer.multipliers.values() if isinstance(factor, tuple))
    starts = {step for factor in factors for step, _ in factor if step <= config.train.steps}
    trained = [part for part in get_args(ModelPart) if part not in untrained]
    yield from messages or (
        f"optimizer.multipliers are all 0 from step {step} on: nothing would be trained, give a part a factor above 0"
        for step in sorted(starts)
        if not any(value_at_step(optimizer.multiplier(part), step) for part in trained)
    )


def _never_above_0(key: str, factor: StepValues, steps: int) -> Iterator[str]:
    """Yield a message if a factor of optimizer.multipliers trains its part at no step."""
    if not any(value for first, value in factor if first <= steps):
        freeze = ", or use train.freeze = [trunk], which needs less memory" if key.endswith(".trunk") else ""
        yield (
            f"{key} is 0 in each of train.steps = {steps}: give it a factor above 0 from one of these steps on{freeze}"
        )


def _untrained_parts(config: Config) -> dict[ModelPart, str]:
    """Return the parts of the model without trained parameters, each with the reason."""
    heads, tied = config.heads, config.model.tie_embeddings
    separate = heads.unembedding == "separate"
    reasons: dict[ModelPart, str] = {}
    if not (heads.traits.first_head_has_block or separate):
        reasons["head_1"] = f"head 1 of heads.kind = '{heads.kind}' is only the final norm and the shared unembedding"
    if tied or separate:
        reasons["unembedding"] = (
            "model.tie_embeddings = true makes it the embedding" if tied else "each head has its own"
        )
    if heads.count == 1 and not heads.token_order:
        reasons["heads"] = "heads.count is 1"
    if config.train.freezes_trunk:
        reasons |= {part: "train.freeze = [trunk] freezes it" for part in get_args(ModelPart) if part != "heads"}
    if config.train.low_rank:
        adapted = {"trunk", "heads", "head_1"} if heads.adapted_layers else {"trunk", "heads"}
        reasons |= {part: "train.low_rank freezes it" for part in get_args(ModelPart) if part not in adapted}
    return reasons


def _indivisible(key: str, value: int, divisor_key: str, divisor: int) -> Iterator[str]:
    if value % divisor:
        yield f"{key} = {value} is not divisible by {divisor_key} = {divisor}: change one of the two"


def _incompatible_parallelism(config: Config) -> Iterator[str]:
    model, parallel, train = config.model, config.parallel, config.train
    dualpipev = parallel.schedule == "dualpipev"
    stages_key = "2 * parallel.pipeline" if dualpipev else "parallel.pipeline"
    # The trunk ends on the first stage with heads.
    trunk_stages, trunk_stages_key = max(1, parallel.stages - config.heads.stages + 1), stages_key
    if config.heads.stages > 1:
        trunk_stages_key = "parallel.pipeline - heads.stages + 1"
    yield from messages_if(
        (
            parallel.zero_stage > 1,
            f"parallel.zero_stage = {parallel.zero_stage} is not 0 or 1: stages 2 and 3 shard gradients and weights "
            "within a step, which the pipeline's micro-batch loop cannot do",
        ),
        (
            parallel.grad_reduce_dtype == "bf16" and train.precision != "bf16",
            f"parallel.grad_reduce_dtype = 'bf16' needs train.precision = 'bf16', not '{train.precision}': gradients "
            "in fp32 are summed in fp32",
        ),
        (
            trunk_stages > model.trunk_layers + 2,
            f"{trunk_stages_key} = {trunk_stages} stages are too many for model.trunk_layers = {model.trunk_layers}: "
            f"all but the first and the last need a layer, use at most {model.trunk_layers + 2}",
        ),
        (
            dualpipev and parallel.pipeline == 1,
            "parallel.schedule = 'dualpipev' needs parallel.pipeline above 1: remove it",
        ),
        (
            dualpipev and train.freezes_trunk,
            "parallel.schedule = 'dualpipev' runs forward and backward passes of the trunk in turn, with "
            "train.freeze = [trunk] there is no backward pass: use '1f1b'",
        ),
    )
    if parallel.partition == "uniform":
        yield from _indivisible("model.trunk_layers", model.trunk_layers, trunk_stages_key, trunk_stages)
    elif not isinstance(parallel.partition, str):
        if len(parallel.partition) != parallel.stages or sum(parallel.partition) != model.trunk_layers:
            yield (
                f"parallel.partition = {list(parallel.partition)} must list {stages_key} = {parallel.stages} "
                f"numbers with the sum model.trunk_layers = {model.trunk_layers}"
            )
        if any(parallel.partition[trunk_stages : parallel.stages]):
            yield (
                f"parallel.partition = {list(parallel.partition)} gives layers to stages behind the first one with "
                f"heads: with heads.stages = {config.heads.stages} the last {config.heads.stages - 1} have 0"
            )
        if 0 in parallel.partition[1 : trunk_stages - 1]:
            yield (
                f"parallel.partition = {list(parallel.partition)} leaves a stage without a layer: only the first "
                "stage, which has the embedding, and the first one with heads can have 0 trunk layers"
            )
    elif parallel.partition == "measured" and config.heads.stages > 1:
        yield (
            f"parallel.partition = 'measured' is incompatible with heads.stages = {config.heads.stages}: it measures "
            "all heads as one, use 'balanced'"
        )


def _incompatible_profile(log: LogConfig, steps: int) -> Iterator[str]:
    if log.profile_steps is None:
        return
    first, last = log.profile_steps
    yield from messages_if(
        (first > last, f"log.profile_steps = [{first}, {last}] must be [first, last] with first <= last"),
        (
            last > steps,
            f"log.profile_steps = [{first}, {last}] goes beyond train.steps = {steps}: choose steps within the run",
        ),
    )


def _incompatible_sources(data: DataConfig) -> Iterator[str]:
    yield from messages_if(
        (
            len({source.stream for source in data.train}) > 1,
            "data.train has sources with and without `stream`: streamed samples are in the order of the documents, "
            "others are shuffled; stream all of them, or prepare those with `mtp-dist prepare`",
        ),
        (
            data.stream_shards > 1 and not data.train[0].stream,
            f"data.stream_shards = {data.stream_shards} splits streams: remove it, or give the training sources "
            "`stream: true`",
        ),
    )
    named = [source.name for source in data.train if source.name]
    if len(set(named)) < len(named) or any(name.isdecimal() for name in named):
        yield f"data.train has sources with the names {named}: give each a different `name` that is not a number"
    for section, sources in (("train", data.train), ("validation", data.validation)):
        for index, source in enumerate(sources):
            if source.options and not source.path.startswith(SYNTHETIC_PREFIX):
                yield (
                    f"data.{section}.{index}.options are parameters of a synthetic task, '{source.path}' is another "
                    "source: remove them"
                )
    names = [source.name for source in data.validation]
    if len(names) > 1 and (None in names or len(set(names)) < len(names)):
        yield f"data.validation has {len(names)} sets with the names {names}: give each a different `name`"


def _incompatible_fields(data: DataConfig) -> Iterator[str]:
    given = [name for name in ("prompt_field", "completion_field") if getattr(data, name) is not None]
    if data.messages_field is not None and given:
        yield (
            f"data.messages_field = '{data.messages_field}' excludes {' and '.join(f'data.{name}' for name in given)}, "
            "as the messages contain the prompts: remove one or the other"
        )
    elif len(given) == 1:
        yield (
            f"data.prompt_field = {_text(data.prompt_field)} and data.completion_field = "
            f"{_text(data.completion_field)} belong together: give both or neither"
        )
    for section, sources in (("train", data.train), ("validation", data.validation)):
        for number, source in enumerate(sources):
            name = "messages_field" if data.messages_field else "completion_field"
            if getattr(data, name) and source.field != SourceConfig(path="-").field:
                yield (
                    f"data.{section}.{number}.field = '{source.field}' has no effect with data.{name} = "
                    f"'{getattr(data, name)}': remove it"
                )


def _text(value: str | None) -> str:
    return "null" if value is None else f"'{value}'"
