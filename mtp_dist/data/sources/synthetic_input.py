"""The documents of a synthetic task as an input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

from mtp_dist.config.synthetic import SYNTHETIC_PREFIX, SyntheticConfig
from mtp_dist.data.sources.input import UNSPLIT, FileCounts, Input, InputOptions, Shard, sha256_of_json
from mtp_dist.data.sources.work_units import WorkUnit
from mtp_dist.data.synthetic.task import HeldOutSplit, TaskCorpus
from mtp_dist.data.synthetic.tasks import build_task, task_kind
from mtp_dist.errors import ConfigError


@dataclass(frozen=True)
class GeneratedDocuments(WorkUnit):
    """Consecutive documents of a task."""

    corpus: TaskCorpus
    first: int

    @property
    def source(self) -> str:
        return SYNTHETIC_PREFIX + self.corpus.task.name

    def documents(self) -> Iterator[bytes]:
        for index in range(self.size):
            yield self.corpus.document(self.first + index).text.encode()

    def location(self, index: int) -> str:
        return f"{self.source}, document {self.first + index}"


class SyntheticInput(Input):
    """Generated documents of a task, numbered from 0."""

    def __init__(self, path: str, options: InputOptions) -> None:
        """Raise ConfigError if a parameter or an option is invalid."""
        if options.fields.need_records:
            names = ["messages"] if options.chat_template else ["prompt", "completion"]
            keys = [f"data.{name}_field" if options.key else f"--{name}-field" for name in names]
            raise ConfigError(
                f"{keys[0]} = '{options.prompt_field or options.field}' does not apply to {options.label(path)}, whose "
                f"documents have no fields: remove {' and '.join(keys)}, or the source"
            )
        parameters = options.synthetic or SyntheticConfig()
        task = build_task(task_kind(path, options.label(path)), parameters, options.option("options."))
        self._corpus = TaskCorpus(task, _split(options), parameters.seed)
        self._count = self.total = parameters.documents
        self.files = FileCounts()
        self._corpus.document(0)  # raises for parameters that leave a split without documents

    def identity(self) -> list[Any]:
        task = self._corpus.task
        return [[SYNTHETIC_PREFIX + task.name, self._corpus.split, self._corpus.seed, self.total, asdict(task)]]

    def fingerprint(self) -> str:
        return sha256_of_json(self.identity())

    def units(self, unit_bytes: int) -> Iterator[WorkUnit]:
        step = max(1, unit_bytes // len(self._corpus.document(0).text))
        for first in range(0, self._count, step):
            yield GeneratedDocuments(self._corpus, first, size=min(step, self._count - first))

    def documents(self, position: Any, shard: Shard = UNSPLIT) -> Iterator[tuple[Any, bytes]]:
        """Yield every num_shards-th document."""
        for number in range(shard.index if position is None else position, self._count, shard.num_shards):
            yield number, self._corpus.document(number).text.encode()


def _split(options: InputOptions) -> HeldOutSplit:
    split = options.split or "train"
    if split not in ("train", "validation"):
        raise ConfigError(
            f"{options.option('split')} = '{split}' is unknown for synthetic tasks: use 'train' or 'validation'"
        )
    return cast(HeldOutSplit, split)
