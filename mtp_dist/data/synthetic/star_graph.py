"""Star graphs G(d, l): find the one of d paths that leads from the start to the goal (Bachmann and Nagarajan 2024).

    document = edge ("|" edge) ... "/" start goal "=" path
    edge     = node node, away from the start
    path     = the l nodes from start to goal

The d (l - 1) edges are shuffled; the labels of the nodes are drawn without replacement. A model that only learns to
follow edges is right from the second step on, but takes the first one by chance: right with probability 1 / d. The
graph and its goal, in whatever order the edges are, decide the split.
"""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from mtp_dist.data.synthetic.task import Answer, Document, HeldOutSplit, Task, draw_from_split

LABELS = tuple(str(node) for node in range(100))

Arm = tuple[str, ...]


@dataclass(frozen=True)
class StarGraph(Task):
    degree: int = 5
    length: int = 5
    nodes: int = 50

    name: ClassVar[str] = "star-graph"
    words: ClassVar[tuple[str, ...]] = ("|", "/", "=", *LABELS)

    def problem(self) -> str | None:
        if self.nodes <= self.degree * (self.length - 1):
            needed = self.degree * (self.length - 1) + 1
            return f"nodes = {self.nodes} is below the {needed} nodes of a graph, degree * (length - 1) + 1: raise it"
        return None

    def draw(self, random: Random, split: HeldOutSplit) -> Document:
        arms = draw_from_split(lambda: self._arms(random), lambda arms: f"{arms[0]} {sorted(arms)}", split)
        edges = [arm[step : step + 2] for arm in arms for step in range(self.length - 1)]
        random.shuffle(edges)
        path = arms[0]
        words = [word for edge in edges for word in (*edge, "|")][:-1]
        words += ["/", path[0], path[-1], "=", *path]
        first = len(words) - self.length + 1
        answers = (
            Answer("first-step", first, first + 1, 1 / self.degree),
            Answer("path", first, len(words), 1 / self.degree),
        )
        return Document(tuple(words), answers)

    def _arms(self, random: Random) -> list[Arm]:
        """Return random paths from the same start; the first one leads to the goal."""
        start, *others = random.sample(LABELS[: self.nodes], self.degree * (self.length - 1) + 1)
        steps = self.length - 1
        return [(start, *others[arm * steps : (arm + 1) * steps]) for arm in range(self.degree)]
