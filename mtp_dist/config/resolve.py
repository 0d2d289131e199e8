"""Resolution of a configuration with its tokenizer's vocabulary size and its world size."""

from mtp_dist.config.base import DeviceMemory
from mtp_dist.config.schema import Config
from mtp_dist.errors import ConfigError


def resolve(config: Config, vocab_size: int, world_size: int) -> Config:
    """Return the configuration with `model.vocab_size` and everything that follows from the world size.

    vocab_size: number of tokens of the tokenizer. Raise ConfigError if the model has fewer, if the ranks do not fit
    the layout, or if the global batch is not divisible among them or has too few micro-batches for the schedule.
    """
    _check_layout(config, world_size)
    model = config.model
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size = {model.vocab_size} is below the {vocab_size} tokens of data.tokenizer = "
            f"'{config.data.tokenizer}': raise it or leave it out"
        )
    model = model.model_copy(update={"vocab_size": model.vocab_size or vocab_size})
    resolved = config.model_copy(update={"model": model})
    resolved._world_size = world_size
    return resolved


def with_device_memory(config: Config, memory: DeviceMemory) -> Config:
    """Return the configuration for ranks that have this memory each."""
    bounded = config.model_copy()
    bounded._device_memory = memory
    return bounded


def _check_layout(config: Config, world_size: int) -> None:
    parallel, train = config.parallel, config.train
    ranks = parallel.tensor * parallel.pipeline
    if world_size % ranks:
        raise ConfigError(
            f"parallel.tensor * parallel.pipeline = {parallel.tensor} * {parallel.pipeline} = {ranks} "
            f"does not divide the world size {world_size}: use a multiple of {ranks} processes (GPUs) or lower a degree"
        )
    samples = train.micro_batch_size * (world_size // ranks)
    if train.global_batch_size % samples:
        raise ConfigError(
            f"train.global_batch_size = {train.global_batch_size} is not divisible by "
            f"train.micro_batch_size * data-parallel degree = {train.micro_batch_size} * {world_size // ranks} = "
            f"{samples}: change one of the two batch sizes"
        )
    if (micro_batches := train.global_batch_size // samples) < parallel.min_micro_batches:
        raise ConfigError(
            f"parallel.schedule = '{parallel.schedule}' with parallel.pipeline = {parallel.pipeline} needs at least "
            f"{parallel.min_micro_batches} micro-batches per step, train.global_batch_size = "
            f"{train.global_batch_size} has {micro_batches} of {samples} samples: raise it to "
            f"{parallel.min_micro_batches * samples}, lower train.micro_batch_size or use '1f1b'"
        )
