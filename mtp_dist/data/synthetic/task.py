"""Interface of synthetic tasks: documents generated from a seed by a grammar, with the answers to be scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal, NamedTuple, TypeVar

from mtp_dist.data.splits import in_validation_split
from mtp_dist.errors import ConfigError

T = TypeVar("T")

HeldOutSplit = Literal["train", "validation"]

MAX_DRAWS = 10_000
"""Draws after which a split counts as empty. A twentieth of all draws are held out."""


class Answer(NamedTuple):
    """Consecutive words of a document that an evaluation counts as right or wrong together."""

    group: str
    """Name of the accuracy that the answer counts for."""
    start: int
    """Index of its first word."""
    end: int
    """Index after its last word."""
    chance: float
    """Probability that a guess is right which knows the task's words and grammar, but does not solve it."""


class Document(NamedTuple):
    words: tuple[str, ...]
    answers: tuple[Answer, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


@dataclass(frozen=True)
class Task(ABC):
    """A synthetic task. The fields of its class are its parameters, by the names of `SyntheticConfig`."""

    name: ClassVar[str]
    words: ClassVar[tuple[str, ...]]
    """Words of all its documents, whatever its parameters are: the vocabulary."""

    def problem(self) -> str | None:
        """Return what is wrong with the parameters, beginning with one of them; None if they fit together."""
        return None

    @abstractmethod
    def draw(self, random: Random, split: HeldOutSplit) -> Document:
        """Return a random document of a split."""


def draw_from_split(draw: Callable[[], T], key: Callable[[T], str], split: HeldOutSplit) -> T:
    """Return the first of several draws that belongs to the split, as its key decides: so the splits are disjoint.

    Raise ConfigError if none does.
    """
    for _ in range(MAX_DRAWS):
        drawn = draw()
        if in_validation_split(key(drawn)) == (split == "validation"):
            return drawn
    raise ConfigError(f"there are too few different documents for the split '{split}': choose larger parameters")


@dataclass(frozen=True)
class TaskCorpus:
    """The documents of one split of a task."""

    task: Task
    split: HeldOutSplit
    seed: int

    def document(self, number: int) -> Document:
        """Return a document by its number, which does not depend on other documents."""
        random = Random(f"{self.task.name} {self.split} {self.seed} {number}")
        return self.task.draw(random, self.split)
