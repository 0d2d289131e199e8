"""The tokenizer and sources of a run, each built or opened once per process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from mtp_dist.config import Config, SourceConfig
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.chat_template import read_chat_template
from mtp_dist.data.corpus import Corpus, corpus_prefix, open_corpus
from mtp_dist.data.sources.conversations import ChatTemplate
from mtp_dist.data.sources.input import Input, InputOptions
from mtp_dist.data.sources.open_inputs import open_inputs
from mtp_dist.data.tokenizer import Tokenizer


class RunSources:
    """The tokenizer, corpora and inputs that a configuration names. Errors name the key."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._corpora: dict[Path, Corpus] = {}
        self._inputs: dict[SourceConfig, Input] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return build_tokenizer(self.config.data.tokenizer)

    @cached_property
    def _chat_template(self) -> ChatTemplate | None:
        """What writes the messages of records, if they have any. Raise ConfigError if the tokenizer has none."""
        return read_chat_template(self.config.data.tokenizer) if self.config.data.messages_field else None

    def open_all(self) -> None:
        """Open every source without reading it. Raise UserError if one is missing or cannot be opened."""
        for key, source in configured_sources(self.config):
            if not self.corpus(source, key):
                self.input(source, key)

    def corpus(self, source: SourceConfig, key: str) -> Corpus | None:
        """Return the prepared corpus that a source names; None if it is another kind of source."""
        prefix = corpus_prefix(source.path)
        if prefix and prefix not in self._corpora:
            self._corpora[prefix] = open_corpus(prefix, f"{key}.path")
        return self._corpora[prefix] if prefix else None

    def input(self, source: SourceConfig, key: str) -> Input:
        """Return the input that a source names."""
        content = content_key(source)
        if content not in self._inputs:
            glob = source.glob if Path(source.path).is_dir() else None
            data = self.config.data
            options = InputOptions(
                data.messages_field or data.completion_field or source.field,
                glob,
                source.subset,
                source.split,
                source.stream,
                key,
                prompt_field=data.prompt_field,
                chat_template=self._chat_template,
                synthetic=source.options,
            )
            self._inputs[content] = open_inputs([source.path], options)[0]
        return self._inputs[content]


def configured_sources(config: Config) -> Iterator[tuple[str, SourceConfig]]:
    """Yield every source with its key, such as `data.train.0`; the training sources first."""
    for section, sources in (("train", config.data.train), ("validation", config.data.validation)):
        for index, source in enumerate(sources):
            yield f"data.{section}.{index}", source


def content_key(source: SourceConfig) -> SourceConfig:
    """Return the source without name and weight: equal for sources with the same tokens."""
    return source.model_copy(update={"name": None, "weight": 1.0})
