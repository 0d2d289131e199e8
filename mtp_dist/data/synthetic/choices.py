"""Text with choice points: tokens after which several phrases are possible, and the choice decides the next words.

    document = PHRASES phrases
    phrase   = word 1 .. word h, free word, word h + 1 .. word `length`, with h = length / 2 rounded up

The first word is one of `branches` and decides the others: `C1` is followed by `C2`, `C3`, ... The free word is as
uncertain, one of `branches`, but decides nothing. Each word is an answer, whose group is `choice`, `determined` or
`free`: the word before a `choice` is a choice point. The choices of a document decide its split.
"""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from mtp_dist.data.synthetic.task import Answer, Document, HeldOutSplit, Task, draw_from_split

PHRASES = 12
MAX_BRANCHES = MAX_LENGTH = 16
LETTERS = "ABCDEFGHIJKLMNOP"
FREE = tuple(f"free{number}" for number in range(MAX_BRANCHES))


@dataclass(frozen=True)
class Choices(Task):
    branches: int = 8
    length: int = 8

    name: ClassVar[str] = "choices"
    words: ClassVar[tuple[str, ...]] = (
        *(f"{letter}{step}" for letter in LETTERS for step in range(1, MAX_LENGTH + 1)),
        *FREE,
    )

    def draw(self, random: Random, split: HeldOutSplit) -> Document:
        chosen = draw_from_split(lambda: random.choices(LETTERS[: self.branches], k=PHRASES), "".join, split)
        words: list[str] = []
        answers: list[Answer] = []

        def append(word: str, group: str) -> None:
            answers.append(Answer(group, len(words), len(words) + 1, 1 / self.branches))
            words.append(word)

        for letter in chosen:
            for step in range(1, self.length + 1):
                append(f"{letter}{step}", "choice" if step == 1 else "determined")
                if step == (self.length + 1) // 2:
                    append(random.choice(FREE[: self.branches]), "free")
        return Document(tuple(words), tuple(answers))
