"""Agreement: a late noun decides the form of the article and the adjectives before it, as in German.

    text     = fact (one per person) question (three per person on average)
    fact     = PERSON NOUN "."
    question = VERB PERSON ARTICLE adjective ... NOUN "?"

A fact has no article. A question is about a random person of the text and repeats that person's noun; its gender, known
from other texts only, decides the article (`einen`, `eine`, `ein`) and the adjectives' endings (`alten`, `alte`,
`altes`), which come first. The first question about a person needs the fact, later ones can also repeat an earlier
article: `article-again`. A guess is the most frequent gender of the text. The facts of a text decide its split.
"""

from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from mtp_dist.data.synthetic.task import Answer, Document, HeldOutSplit, Task, draw_from_split

PEOPLE = tuple("Anna Ben Clara David Emma Felix Greta Hans Ida Jonas Karl Lena".split())
VERBS = tuple("findet kauft malt sieht sucht verkauft zeichnet".split())
STEMS = tuple("alt grau klein neu rot schwer".split())
ARTICLES = ("einen", "eine", "ein")
ENDINGS = ("en", "e", "es")
NOUNS = (
    tuple("Apfel Baum Ball Hund Hut Korb Mantel Schrank Stuhl Tisch".split()),
    tuple("Blume Flasche Gabel Jacke Katze Lampe Tasse Tasche Uhr Vase".split()),
    tuple("Bett Bild Boot Buch Fahrrad Glas Haus Messer Pferd Sofa".split()),
)
"""Nouns of the genders masculine, feminine and neuter; articles and endings are in the same order."""
QUESTIONS_PER_PERSON = 3
GENDER = {noun: gender for gender, nouns in enumerate(NOUNS) for noun in nouns}


@dataclass(frozen=True)
class Agreement(Task):
    people: int = 4
    adjectives: int = 1

    name: ClassVar[str] = "agreement"
    words: ClassVar[tuple[str, ...]] = (
        *(".", "?"),
        *(*PEOPLE, *VERBS, *ARTICLES),
        *(stem + ending for stem in STEMS for ending in ENDINGS),
        *GENDER,
    )

    def draw(self, random: Random, split: HeldOutSplit) -> Document:
        facts = draw_from_split(lambda: self._facts(random), lambda drawn: str(sorted(drawn.items())), split)
        words = [word for person, noun in facts.items() for word in (person, noun, ".")]
        answers = []
        genders = Counter(GENDER[noun] for noun in facts.values())
        asked: set[str] = set()
        for _ in range(QUESTIONS_PER_PERSON * self.people):
            person = random.choice(list(facts))
            noun = facts[person]
            gender = GENDER[noun]
            adjectives = [random.choice(STEMS) + ENDINGS[gender] for _ in range(self.adjectives)]
            article = len(words) + 2
            words += [random.choice(VERBS), person, ARTICLES[gender], *adjectives, noun, "?"]
            again = "-again" if person in asked else ""
            answers.append(Answer(f"article{again}", article, article + 1, max(genders.values()) / self.people))
            answers.append(Answer(f"noun{again}", len(words) - 2, len(words) - 1, 1 / genders[gender]))
            asked.add(person)
        return Document(tuple(words), tuple(answers))

    def _facts(self, random: Random) -> dict[str, str]:
        """Return a random noun of each person."""
        nouns = random.sample(list(GENDER), self.people)
        return dict(zip(random.sample(PEOPLE, self.people), nouns, strict=True))
