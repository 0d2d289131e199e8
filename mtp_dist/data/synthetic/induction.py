"""Induction: stories whose names have two tokens, of which the second must be recalled (Gloeckle et al. 2024, 4.1).

    story     = introduction (one per name) event (two per name) "the end ."
    introduction = "there was a" ADJECTIVE ANIMAL "named" name "."
    event     = one of EVENTS, with names of the story, never the same twice in one event
    name      = FIRST SECOND

The second token of a new name follows from nothing but an earlier occurrence of the name. A training story has new
names with probability `new_names`; the other stories share names, one per first token, that can be memorized. Held-out
stories have new names. The names of a story decide its split: no held-out story has those of a training story. A guess
is a name of the story that the event has not mentioned yet: with two names the second one of an event is certain.
"""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from mtp_dist.data.synthetic.task import Answer, Document, HeldOutSplit, Task, draw_from_split

SYLLABLES = tuple(consonant + vowel for consonant in "bdkl" for vowel in "aeiou")
FIRST = tuple(syllable.capitalize() for syllable in SYLLABLES)
SECOND = tuple(f"-{syllable}" for syllable in SYLLABLES)
ADJECTIVES = tuple("big brave clever funny happy kind little old quiet shy small young".split())
ANIMALS = tuple("bear bird cat dog duck fish fox frog goat hen mouse pig rabbit".split())
PLACES = tuple("barn beach forest garden house lake park pond river road school shop".split())
THINGS = tuple("apple ball basket boat book cake flower hat key stick stone toy".split())
FEELINGS = tuple("angry glad hungry proud sad scared surprised tired".split())
SLOTS = {"ADJECTIVE": ADJECTIVES, "ANIMAL": ANIMALS, "PLACE": PLACES, "THING": THINGS, "FEELING": FEELINGS}
INTRODUCTION = "there was a ADJECTIVE ANIMAL named NAME ."
EVENTS = (
    "one day NAME went to the PLACE with NAME .",
    "NAME found a ADJECTIVE THING in the PLACE .",
    "NAME gave the THING to NAME .",
    "then NAME was FEELING and said to NAME : come to the PLACE .",
    "NAME saw a THING near the PLACE .",
    "NAME asked NAME for the ADJECTIVE THING .",
    "so NAME and NAME were FEELING .",
    "in the PLACE NAME played with the THING .",
)
ENDING = "the end ."
_SENTENCE_WORDS = {word for sentence in (INTRODUCTION, *EVENTS, ENDING) for word in sentence.split()}

Name = tuple[str, str]


@dataclass(frozen=True)
class Induction(Task):
    names: int = 2
    new_names: float = 1.0

    name: ClassVar[str] = "induction"
    words: ClassVar[tuple[str, ...]] = (
        *sorted({*_SENTENCE_WORDS, *sum(SLOTS.values(), ())} - {"NAME", *SLOTS}),
        *FIRST,
        *SECOND,
    )

    def draw(self, random: Random, split: HeldOutSplit) -> Document:
        new = split == "validation" or random.random() < self.new_names
        names = draw_from_split(lambda: self._names(new, random), lambda drawn: str(sorted(drawn)), split)
        words: list[str] = []
        answers: list[Answer] = []
        for name in names:
            _append(INTRODUCTION, [name], names, words, answers, random)
        for _ in range(2 * self.names):
            _append(random.choice(EVENTS), random.sample(names, 2), names, words, answers, random)
        return Document((*words, *ENDING.split()), tuple(answers))

    def _names(self, new: bool, random: Random) -> list[Name]:
        """Return the names of a story, whose first tokens differ."""
        firsts = random.sample(range(len(FIRST)), self.names)
        seconds = random.choices(SECOND, k=self.names) if new else [SECOND[first] for first in firsts]
        return [(FIRST[first], second) for first, second in zip(firsts, seconds, strict=True)]


def _append(
    sentence: str, names: list[Name], story: list[Name], words: list[str], answers: list[Answer], random: Random
) -> None:
    """Append a sentence with random words and the given names, and its names' tokens as answers.

    story: all names of the story.
    """
    unmentioned = list(story)
    unused = iter(names)
    for word in sentence.split():
        if word != "NAME":
            words.append(random.choice(SLOTS[word]) if word in SLOTS else word)
            continue
        name = next(unused)
        start = len(words)
        if name[0] in words:
            same_second = sum(other[1] == name[1] for other in unmentioned)
            answers.append(Answer("known-first", start, start + 1, 1 / len(unmentioned)))
            answers.append(Answer("known-second", start + 1, start + 2, same_second / len(unmentioned)))
        else:
            answers.append(Answer("new-second", start + 1, start + 2, 1 / len(SECOND)))
        unmentioned.remove(name)
        words.extend(name)
