"""The sections of a configuration: every key with its type, default, unit and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from mtp_dist.config.base import DeviceMemory, NonNegativeInt, PathText, PositiveInt, Seconds, Section, StepValues
from mtp_dist.config.heads import HeadsConfig
from mtp_dist.config.low_rank import LowRankConfig
from mtp_dist.config.model import ModelConfig
from mtp_dist.config.synthetic import SyntheticConfig


class RunConfig(Section):
    """Name, place and process settings of a run."""

    name: Annotated[str, Field(pattern=r"^[^/.\s\x00][^/\x00]*$", max_length=100)] = "run"
    """Title of the run in logs and reports."""
    output_dir: PathText | None = None
    """Folder of this run's metrics, TensorBoard files and checkpoints; by default `runs/<name>`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Seed of the initial weights and of the order of the samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the computation. `auto` selects the GPU if there is one, and rejects a machine whose GPU PyTorch cannot
    use."""
    step_timeout: Seconds | None = 1800.0
    """Seconds that a step, a validation or the wait for a save may take. After that every rank prints its Python stacks
    and writes its last collectives, and the run ends with status 70. `null`: no limit."""
    join_timeout: Seconds = 600.0
    """Seconds that the ranks wait for one another at the start. After that the run ends with status 2 and names the
    missing ranks."""


class ParallelConfig(Section):
    """The layout over ranks."""

    tensor: PositiveInt = 1
    """Tensor-parallel degree: ranks that share each layer's matrices and the vocabulary."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel degree: ranks that share the layers, in stages of which the last ones have the heads."""
    sequence: bool = False
    """Sequence parallelism: shard activations along the sequence between tensor-parallel regions."""
    zero_stage: Annotated[NonNegativeInt, Field(json_schema_extra={"enum": [0, 1]})] = 0
    """0, or 1 to shard the optimizer state over the data-parallel ranks."""
    grad_reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which the data-parallel ranks sum gradients. `bf16`, only with `train.precision: bf16`, halves the
    traffic and rounds each gradient, and the sum at each rank, to 8 bits."""
    schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    """Pipeline schedule. `1f1b`: one stage per rank. `dualpipev`: two, so that rank r of p has stages r and 2p - 1 - r,
    rank 0 the embedding and the heads; a step needs at least 2p micro-batches."""
    partition: (
        Literal["balanced", "measured", "uniform"]
        | Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)]
    ) = "balanced"
    """Trunk layers per stage: `balanced` makes the slowest rank as fast as possible by the FLOPs of layers and heads,
    of the splits that fit the memory; `measured` does so by their times, measured for about a second at the start;
    `uniform` gives every stage the same number, a list such as [4, 4, 3, 1] sets each stage. Only the first and the
    last stage can have 0."""
    check_memory: bool = True
    """Refuse, before anything is built, a run whose estimated memory exceeds the device's. `false`: start it anyway."""

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return self.pipeline * (2 if self.schedule == "dualpipev" else 1)

    def rank_stages(self, rank: int) -> tuple[int, ...]:
        """Return the stages of a pipeline rank, in the order in which a micro-batch passes through them."""
        return (rank,) if self.schedule == "1f1b" else (rank, self.stages - 1 - rank)

    @property
    def min_micro_batches(self) -> int:
        """Smallest number of micro-batches per training step, and per validation, that the schedule can run."""
        return self.stages if self.schedule == "dualpipev" else 1


MAX_TEXT_LOSS = 0.01


class SourceConfig(Section):
    """One source of documents."""

    path: PathText
    """A corpus made by `mtp-dist prepare` or by Megatron's tools, by its path without `.bin`; or, for small data that
    is tokenized at each start: a folder, a file of text, JSON lines, JSON, CSV or Parquet, the name of a Hugging Face
    dataset, `python-stdlib`, the standard library of this Python, or a synthetic task such as `synthetic/induction`."""
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """Name in logs; required if there are several validation sets."""
    subset: str | None = None
    """Subset of a Hugging Face dataset that has several."""
    split: str | None = None
    """Part of the source. For files `train` or `validation`, to which about one file in twenty belongs by a hash of its
    relative path; for a Hugging Face dataset one of its splits, by default `train`; for a synthetic task `train`, the
    default, or `validation`."""
    glob: PathText = "**/*.py"
    """Pattern of the files of a folder. Linked folders are followed; names that begin with a dot are left out unless a
    part of the pattern does."""
    field: str = "text"
    """Field with the document, in JSON, CSV, Parquet and datasets."""
    stream: bool = False
    """Train on the documents in order while they are read, without tokenizing all of them first: for datasets that are
    too large for memory and not worth preparing."""
    weight: PositiveFloat = 1.0
    """Sampling weight: fraction of the training samples drawn from this source, relative to the other weights.
    Validation ignores it."""
    options: SyntheticConfig | None = None
    """Parameters of a synthetic task; by default the task's."""


class DataConfig(Section):
    """Sources, tokenizer and document boundaries."""

    train: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)]
    """Sources of the training samples."""
    validation: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = ()
    """Validation sets, each with losses of its own; no validation when empty."""
    stream_shards: PositiveInt = 1
    """Shards of each streamed training source. Sample i comes from shard i modulo this number, whatever the layout, and
    a data-parallel rank tokenizes only the shards of its samples: a multiple of every data-parallel degree that the run
    may have, such as 64, divides the work evenly. 1: the order of the documents, and every rank tokenizes all."""
    tokenizer: PathText = "bytes"
    """`bytes`: one token per byte and an end-of-document token; a synthetic task such as `synthetic/induction`: one per
    word of its documents; or a `tokenizer.json` or SentencePiece `.model` file, a folder with one, or a name in the
    Hugging Face cache of this machine."""
    prompt_field: Annotated[str, Field(min_length=1)] | None = None
    """Field of each record with a prompt, for finetuning: its tokens are read, but no head learns to predict them. It
    needs `completion_field`. The two texts are tokenized one by one and joined without a separator; a head's target
    counts if it belongs to a completion or ends a document. For JSON lines, JSON, CSV, Parquet and datasets; prepared
    corpora contain the prompts that `mtp-dist prepare --prompt-field` has marked. By default every token is learned."""
    completion_field: Annotated[str, Field(min_length=1)] | None = None
    """Field of each record with the completion of its prompt, instead of the source's `field`. Records with an empty
    completion are left out."""
    messages_field: Annotated[str, Field(min_length=1)] | None = None
    """Field of each record with a conversation, for finetuning: a list of messages, each with a `role` (`system`,
    `user`, `assistant` or `tool`) and `content`, which the chat template of the tokenizer writes as text. The
    assistant's turns are learned, up to the token that ends them; all other tokens are read like those of prompts. For
    JSON lines, JSON, Parquet and datasets; prepared corpora contain what `mtp-dist prepare --messages-field` has
    marked. By default records have no messages."""
    max_text_loss: Annotated[float, Field(ge=0, le=1)] = MAX_TEXT_LOSS
    """Largest fraction of a source's text, measured on a sample, that may be lost by encoding and decoding: characters
    that the tokenizer has no tokens for, or changes, except whitespace. A source that loses more is rejected."""
    loss_across_documents: bool = True
    """`false`: ignore targets in another document than the token at their position. A document ends with its
    end-of-document token, beyond which token-order prediction ranks no tokens either."""
    attention_across_documents: bool = True
    """`false`: restrict attention to the position's own document, in the trunk and the heads. On a GPU this excludes
    the flash kernel."""

    @property
    def has_prompts(self) -> bool:
        """Whether records have tokens that no head learns: prompts, or all but the assistant's turns."""
        return self.prompt_field is not None or self.messages_field is not None


class TrainConfig(Section):
    """Batches, precision, validation and reactions to bad steps."""

    steps: PositiveInt
    """Number of optimizer updates."""
    global_batch_size: PositiveInt
    """Samples per step, over all data-parallel ranks and micro-batches."""
    micro_batch_size: PositiveInt
    """Samples per forward and backward pass on one data-parallel rank."""
    sequence_length: PositiveInt
    """Tokens per sample, S. The tokens that follow, as many as the largest prediction distance or, if that is larger,
    the token-order window, are read as labels too."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """`bf16` keeps master weights, moments and accumulated gradients in fp32."""
    deterministic: bool = False
    """Make runs on GPUs bitwise reproducible: only deterministic kernels of PyTorch, cuBLAS and Megatron-core, and
    NCCL's ring unless `NCCL_ALGO` is set. Slower. Runs on a CPU are reproducible without it."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes: none, those of each layer's MLP, or those of each full layer."""
    grad_clip: NonNegativeFloat = 1.0
    """Global norm to which the gradient is clipped; 0: no clipping."""
    max_skipped_steps: PositiveInt = 10
    """A step with a NaN or Inf in its loss or gradient changes no weight. After this many in a row the run ends with
    status 2."""
    spike_deviations: PositiveFloat | None = 6.0
    """A loss of head 1 this many standard deviations above the mean of the 128 previous steps is a spike, which is
    logged. `null`: no detection."""
    spike_rollback: bool = False
    """Roll back to the newest checkpoint at a spike and continue with the samples after it."""
    validate_every: PositiveInt | None = None
    """Steps between two validations; there is always one at the end."""
    validation_samples: PositiveInt = 128
    """Samples per validation set, evenly spaced; all of them if it has fewer."""
    freeze: Annotated[tuple[Literal["trunk"], ...], Field(strict=False, max_length=1)] = ()
    """`[trunk]`: train further heads on a trained model, whose weights stay bitwise the same: embedding, trunk, head 1
    and the final norm, with the unembedding that heads share or with head 1's own. They get no gradient, moments or
    master weights; the trunk runs forward only. By default everything is trained."""
    low_rank: LowRankConfig | None = None
    """Adapt a trained model that predicts the next token by low-rank adapters on the layers of trunk and head 1; its
    own weights are frozen. Heads 2..n are trained too. By default there are no adapters."""

    @property
    def freezes_trunk(self) -> bool:
        return "trunk" in self.freeze

    @property
    def freezes_weights(self) -> bool:
        return self.freezes_trunk or self.low_rank is not None


ModelPart = Literal["trunk", "embedding", "head_1", "unembedding", "heads"]
"""A part of the model that may have a learning rate of its own, see `OptimizerConfig.multipliers`."""


class OptimizerConfig(Section):
    """Optimizer and learning rate."""

    name: Literal["adamw"] = "adamw"
    """AdamW with decoupled weight decay."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    betas: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the moment estimates."""
    eps: PositiveFloat = 1e-8
    """Number added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; norms and biases are never decayed."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warmup to `lr`."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warmup: a cosine down to `min_lr_ratio * lr` at the last step, or `lr` throughout."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Floor of the cosine, relative to `lr`."""
    multipliers: dict[ModelPart, PositiveFloat | StepValues] = Field(default={})
    """Factors of the learning rate by part of the model, such as {trunk: 0.1, heads: 1.0}; 1 by default. `trunk`: the
    model that predicts the next token, which is the embedding, the trunk's layers, head 1, the final norm and the
    shared unembedding; `embedding`, `head_1`, `unembedding` (the shared one): that part instead of `trunk`; `heads`:
    heads 2..n, with their own unembeddings and their condition, and token-order prediction. Decoupled weight decay,
    which is proportional to the learning rate, is multiplied too. A list such as {trunk: [[1, 0], [500, 0.1]]} changes
    the factor at these steps; at 0 the weights stay bitwise the same."""

    def multiplier(self, part: ModelPart) -> float | StepValues:
        """Return the factor of a part."""
        return self.multipliers.get(part, 1.0 if part == "heads" else self.multipliers.get("trunk", 1.0))


class CheckpointConfig(Section):
    """Saving and resuming."""

    directory: PathText | None = None
    """Folder of the checkpoints; by default `<run.output_dir>/checkpoints`."""
    every: PositiveInt | None = None
    """Steps between two checkpoints; there is always one at the end."""
    keep_last: PositiveInt | None = None
    """Number of newest checkpoints to keep; older ones are deleted after a newer one has been written and read back. By
    default all are kept."""
    keep_every: PositiveInt | None = None
    """Also keep checkpoints whose step is a multiple of this; only with `keep_last`."""
    resume: PathText = "auto"
    """Checkpoint to resume from: `auto` for the newest one of `directory`, if there is one; `none` to start from
    scratch; or the folder of a checkpoint, or of several, of which the newest valid one is used."""
    initial_weights: PathText | None = None
    """Checkpoint, folder of a run or export of `mtp-dist export` whose weights a new run starts from, at step 0, with a
    new optimizer, schedule and data (finetuning). The number of heads may differ: heads that it lacks are initialized,
    further ones are not used. Once the run has a checkpoint of its own, `resume: auto` continues from that. By default
    the weights are initialized at random."""
    allow_changes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Keys, such as [heads.count, train.steps], that may differ from those that the checkpoint was trained with.
    Weights that the checkpoint lacks are initialized, weights that the model lacks are dropped."""


class LogConfig(Section):
    """Logs, profiles and the sample at the end."""

    every: PositiveInt = 10
    """Steps between two lines of `metrics.jsonl`, of TensorBoard and of the terminal."""
    tensorboard: bool = True
    """Write TensorBoard files into `<run.output_dir>/tensorboard`."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Project on Weights & Biases to log to; needs the package `wandb`. By default none."""
    rank_logs: bool = False
    """Copy the standard output and standard error of each rank into `<run.output_dir>/logs/rank_00000.log`,
    `rank_00001.log`, ..."""
    sample_prompt: str | None = None
    """Text that rank 0 continues at the end, with the last checkpoint unsharded on its CPU: for small models. By
    default none."""
    sample_tokens: PositiveInt = 200
    """Largest number of tokens of that continuation. It ends at the end of the document, and when prompt and
    continuation have `train.sequence_length` tokens; a prompt of more than half as many loses its beginning."""
    profile_steps: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] | None = None
    """First and last step of a PyTorch profiler trace in `<run.output_dir>/profile`, such as [5, 7]; by default
    none."""
    profile_ranks: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)] = (0,)
    """Ranks that write a trace, and a memory snapshot with `--memory-snapshot`."""


class Config(Section):
    """All sections of a run. The properties below `without_adapters` exist after `resolve`."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    heads: HeadsConfig = HeadsConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Keys added unchanged to the DeepSpeed configuration; keys that mtp-dist derives cannot be set."""
    _world_size: int | None = None
    _device_memory: DeviceMemory | None = None

    @property
    def output_dir(self) -> Path:
        return Path(self.run.output_dir or f"runs/{self.run.name}")

    @property
    def checkpoint_dir(self) -> Path:
        given = self.checkpoint.directory
        return Path(given) if given else self.output_dir / "checkpoints"

    def without_adapters(self) -> Config:
        """Return the configuration of the same model with its low-rank adapters merged."""
        return self.model_copy(update={"train": self.train.model_copy(update={"low_rank": None})})

    @property
    def device_memory(self) -> DeviceMemory | None:
        """Memory of each rank's device, which bounds `parallel.partition: balanced`; None for no bound."""
        return self._device_memory

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, before padding."""
        assert self.model.vocab_size is not None, "the configuration is resolved"
        return self.model.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all tensor-parallel ranks."""
        return padded_vocab_size(self.vocab_size, self.parallel.tensor)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        assert self._world_size is not None, "the configuration is resolved"
        return self._world_size

    @property
    def dp_size(self) -> int:
        """Data-parallel degree: world size / (tensor * pipeline)."""
        return self.world_size // (self.parallel.tensor * self.parallel.pipeline)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step on each data-parallel rank (gradient accumulation steps)."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.dp_size)


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Round up so that every rank holds the same number of rows, a multiple of 64 for fast matmuls."""
    multiple = 64 * tp_size
    return -(-vocab_size // multiple) * multiple
