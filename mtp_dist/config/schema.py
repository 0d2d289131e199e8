"""The sections of a configuration: every key with its type, default, unit and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from mtp_dist.config.base import NonNegativeInt, PathText, PositiveInt, Seconds, Section
from mtp_dist.config.heads import HeadsConfig
from mtp_dist.config.rope import RopeScalingConfig


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[^/.\s\x00][^/\x00]*$", max_length=100)] = "run"
    """Title of the run in logs and reports."""
    output_dir: PathText | None = None
    """Folder of this run's metrics, TensorBoard files and checkpoints; `runs/<name>` when absent."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Seed of the initial weights and of the order of the samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. `auto` takes the GPU if there is one, and refuses a machine whose GPU PyTorch cannot use."""
    step_timeout: Seconds | None = 1800.0
    """Seconds that a step, a validation or the wait for a save may take; after that every rank prints its Python
    stacks, writes its last collectives, and the run ends with status 70. `null`: no limit."""
    join_timeout: Seconds = 600.0
    """Seconds that the ranks wait for one another at the start; after that the run ends with status 2 and names those
    that have not come."""


class ModelConfig(Section):
    hidden_size: PositiveInt
    """Width D of the trunk."""
    trunk_layers: Annotated[PositiveInt, Field(le=10_000)]
    """Transformer layers of the trunk. A parameter-matched comparison of models with heads of one layer
    keeps `trunk_layers + heads.count` constant."""
    num_attention_heads: PositiveInt
    """Query heads of each attention layer."""
    num_query_groups: PositiveInt | None = None
    """Key-value heads (grouped-query attention); as many as `num_attention_heads` when absent."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of the SwiGLU layer; 8/3 of `hidden_size`, rounded up to a multiple of 64, when absent."""
    vocab_size: PositiveInt | None = None
    """Tokens of the vocabulary before padding; the tokenizer's when absent."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding's wavelengths."""
    rope_scaling: RopeScalingConfig | None = None
    """Longer wavelengths, for texts longer than those of an earlier training; none when absent."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding's weight as the unembedding too."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections into the residual stream get it over sqrt(2 * depth)."""

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or -(-8 * self.hidden_size // (3 * 64)) * 64

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads


class ParallelConfig(Section):
    tensor: PositiveInt = 1
    """Tensor-parallel degree: ranks that share each layer's matrices and the vocabulary."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel degree: stages that share the layers; the heads sit on the last one."""
    sequence: bool = False
    """Sequence parallelism: shard activations along the sequence between tensor-parallel regions."""
    zero_stage: NonNegativeInt = 0
    """0, or 1 to shard the optimizer state over the data-parallel ranks."""
    grad_reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which precision the data-parallel ranks sum gradients. `bf16`, only with `train.precision: bf16`, halves the
    traffic and rounds each gradient to 8 bits, the sum again at each rank."""
    schedule: Literal["1f1b"] = "1f1b"
    """Pipeline schedule."""
    partition: (
        Literal["balanced", "uniform"] | Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)]
    ) = "balanced"
    """Trunk layers of each stage: `balanced` counts the cost of the heads, `uniform` gives every stage the same
    number, a list such as [4, 4, 3, 1] gives them one by one."""


MAX_TEXT_LOSS = 0.01


class SourceConfig(Section):
    path: PathText
    """A corpus of `mtp-dist prepare` or of Megatron's tools, by its path without `.bin`; or, for small data that is
    tokenized at each start: a folder, a file of text, JSON lines, JSON, CSV or Parquet, the name of a Hugging Face
    dataset, or `python-stdlib`, the standard library of this Python."""
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """In logs; several validation sets need one each."""
    subset: str | None = None
    """Of a Hugging Face dataset that has several."""
    split: str | None = None
    """Part of the source: of files `train` or `validation`, to which about one in twenty belongs by a hash of its
    relative path; of a Hugging Face dataset one of its splits, `train` when absent."""
    glob: PathText = "**/*.py"
    """Which files of a folder. Linked folders are followed, and what begins with a dot is left out unless a part of the
    pattern does."""
    field: str = "text"
    """Which field of JSON, CSV, Parquet and datasets is the document."""
    stream: bool = False
    """Train on the documents in their order while they are read, without tokenizing all of them first: for datasets
    that are too large for memory and are not worth preparing."""
    weight: PositiveFloat = 1.0
    """Share of the training samples drawn from this source, relative to the other weights; validation ignores it."""


class DataConfig(Section):
    train: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)]
    """Sources of the training samples."""
    validation: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = ()
    """Validation sets, each with losses of its own; no validation when empty."""
    stream_shards: PositiveInt = 1
    """Shards of each streamed training source. Sample i comes from shard i modulo this number, whatever the layout, and
    a data-parallel rank tokenizes only the shards of its samples: a multiple of every data-parallel degree that the run
    may have, such as 64, divides the work evenly. 1: the order of the documents, and every rank tokenizes all."""
    tokenizer: PathText = "bytes"
    """`bytes`: one token a byte and an end-of-document token; or a `tokenizer.json` or SentencePiece `.model` file, a
    folder with one, or a name in the Hugging Face cache of this machine."""
    max_text_loss: Annotated[float, Field(ge=0, le=1)] = MAX_TEXT_LOSS
    """Share of a source's text, measured on a sample, that may not survive encoding and decoding: characters that the
    tokenizer has no tokens for, or changes, except whitespace. A source that loses more is refused."""
    loss_across_documents: bool = True
    """`false`: a head's target counts only where it lies in the same document as the token at its position. A document
    ends with its end-of-document token. Token-order prediction ranks no tokens beyond it then."""
    attention_across_documents: bool = True
    """`false`: a position attends only to its own document, in the trunk and the heads. On a GPU that excludes the
    flash kernel."""


class TrainConfig(Section):
    steps: PositiveInt
    """Optimizer updates."""
    global_batch_size: PositiveInt
    """Samples of one step, over all data-parallel ranks and micro-batches."""
    micro_batch_size: PositiveInt
    """Samples of one forward and backward pass on one data-parallel rank."""
    sequence_length: PositiveInt
    """Tokens of a sample, S; `heads.count` more are read as labels."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """`bf16` keeps master weights, moments and accumulated gradients in fp32."""
    deterministic: bool = False
    """Let a run repeat bitwise on GPUs too: only deterministic kernels of PyTorch, cuBLAS and Megatron-core, and NCCL's
    ring unless `NCCL_ALGO` is set. Slower. On a CPU runs repeat without it."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes: nothing, each layer's MLP, or each layer whole."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    max_skipped_steps: PositiveInt = 10
    """A step whose loss or gradient is not finite changes no weight. After so many in a row the run ends with status
    2."""
    spike_deviations: PositiveFloat | None = 6.0
    """A loss of head 1 this many standard deviations above the mean of the 128 steps before is a spike, which the log
    and the events tell. `null`: nothing is."""
    spike_rollback: bool = False
    """Go back to the newest checkpoint at a spike, and from there on with the samples after it."""
    validate_every: PositiveInt | None = None
    """Steps between two validations; one at the end in any case."""
    validation_samples: PositiveInt = 128
    """Samples of each validation set, spaced evenly over it; all there are where it has fewer."""


class OptimizerConfig(Section):
    name: Literal["adamw"] = "adamw"
    """AdamW with decoupled weight decay."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    betas: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Field(strict=False)] = (0.9, 0.95)
    """Decay of the moments' averages."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; norms and biases are never decayed."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warmup to `lr`."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warmup: a cosine down to `min_lr_ratio * lr` at the last step, or `lr` throughout."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Floor of the cosine, relative to `lr`."""


class CheckpointConfig(Section):
    directory: PathText | None = None
    """Folder of the checkpoints; `<run.output_dir>/checkpoints` when absent."""
    every: PositiveInt | None = None
    """Steps between two checkpoints; one at the end in any case."""
    keep_last: PositiveInt | None = None
    """Checkpoints that are kept, the newest ones; older ones are deleted when a newer one has been written and read
    back. All are kept when absent."""
    keep_every: PositiveInt | None = None
    """Those of steps that are a multiple of it are kept in any case; only with `keep_last`."""
    resume: PathText = "auto"
    """Where to go on: `auto` from the newest checkpoint of `directory`, if there is one; `none` starts anew; or the
    folder of a checkpoint, or of several, of which the newest is taken. Of several, damaged ones are passed over."""
    allow_changes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Keys, such as [heads.count, train.steps], that may differ from those the checkpoint was trained with. Weights
    that it lacks start anew, those that are no longer wanted are left out."""


class LogConfig(Section):
    every: PositiveInt = 10
    """Steps between two lines of `metrics.jsonl`, of TensorBoard and of the terminal."""
    tensorboard: bool = True
    """Write TensorBoard files into `<run.output_dir>/tensorboard`."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Project on Weights & Biases to write into too; needs the package `wandb`. None when absent."""
    rank_logs: bool = False
    """Copy what each rank writes to standard output and standard error into `<run.output_dir>/logs/rank_00000.log`,
    `rank_00001.log`, ..."""
    sample_prompt: str | None = None
    """When given, rank 0 opens the last checkpoint unsharded on its CPU and shows a continuation of this text at the
    end: for small models."""
    sample_tokens: PositiveInt = 200
    """Tokens of that continuation."""
    profile_steps: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] | None = None
    """First and last step of a PyTorch profiler trace in `<run.output_dir>/profile`, such as [5, 7]; none when
    absent."""
    profile_ranks: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)] = (0,)
    """Ranks that write a trace, and a memory snapshot with `--memory-snapshot`."""


class Config(Section):
    """All sections of a run. The properties below `checkpoint_dir` exist after `resolve`."""

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
    """Keys added to the DeepSpeed configuration as they are; those that we derive cannot be set here."""
    _world_size: int | None = None

    @property
    def output_dir(self) -> Path:
        return Path(self.run.output_dir or f"runs/{self.run.name}")

    @property
    def checkpoint_dir(self) -> Path:
        given = self.checkpoint.directory
        return Path(given) if given else self.output_dir / "checkpoints"

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
    def dp_size(self) -> int:
        """Data-parallel degree: world size / (tensor * pipeline)."""
        assert self._world_size is not None, "the configuration is resolved"
        return self._world_size // (self.parallel.tensor * self.parallel.pipeline)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step on each data-parallel rank (gradient accumulation steps)."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.dp_size)


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Round up so that every rank holds the same number of rows, a multiple of 64 for fast matmuls."""
    multiple = 64 * tp_size
    return -(-vocab_size // multiple) * multiple
