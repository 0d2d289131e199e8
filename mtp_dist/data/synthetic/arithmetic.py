"""Polynomial arithmetic in F7[X]/(X^k), with k = 5 by default (Gloeckle et al. 2024, 4.2).

    document   = expression "=" polynomial
    expression = polynomial | "neg" expression | ("+" | "*" | "o") expression expression
    polynomial = k coefficients, that of X^0 first

Operators come before their operands, so no brackets are needed; `o` substitutes the second operand for X in the first.
The number of operations is uniform in 1..`operations`. Each operator and each coefficient is uniform, and the
operations left after a binary operator are divided uniformly between its operands. The expression decides the split.
"""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from mtp_dist.data.synthetic.task import Answer, Document, HeldOutSplit, Task, draw_from_split

MODULUS = 7
OPERATORS = ("neg", "+", "*", "o")

Polynomial = tuple[int, ...]


@dataclass(frozen=True)
class Arithmetic(Task):
    operations: int = 5
    coefficients: int = 5

    name: ClassVar[str] = "arithmetic"
    words: ClassVar[tuple[str, ...]] = (*map(str, range(MODULUS)), *OPERATORS, "=")

    def draw(self, random: Random, split: HeldOutSplit) -> Document:
        operations = random.randint(1, self.operations)
        expression, value = draw_from_split(
            lambda: self._expression(operations, random), lambda drawn: " ".join(drawn[0]), split
        )
        words = (*expression, "=", *map(str, value))
        chance = MODULUS**-self.coefficients
        answer = Answer(f"operations-{operations:02}", len(words) - self.coefficients, len(words), chance)
        return Document(words, (answer,))

    def _expression(self, operations: int, random: Random) -> tuple[tuple[str, ...], Polynomial]:
        """Return a random expression and its value."""
        if operations == 0:
            value = tuple(random.randrange(MODULUS) for _ in range(self.coefficients))
            return tuple(map(str, value)), value
        operator = random.choice(OPERATORS)
        if operator == "neg":
            operand, value = self._expression(operations - 1, random)
            return (operator, *operand), tuple(-c % MODULUS for c in value)
        in_left = random.randint(0, operations - 1)
        left, a = self._expression(in_left, random)
        right, b = self._expression(operations - 1 - in_left, random)
        return (operator, *left, *right), {"+": add, "*": multiply, "o": compose}[operator](a, b)


def add(a: Polynomial, b: Polynomial) -> Polynomial:
    return tuple((x + y) % MODULUS for x, y in zip(a, b, strict=True))


def multiply(a: Polynomial, b: Polynomial) -> Polynomial:
    return tuple(sum(a[i] * b[k - i] for i in range(k + 1)) % MODULUS for k in range(len(a)))


def compose(a: Polynomial, b: Polynomial) -> Polynomial:
    """Return a(b(X)), by Horner's rule."""
    value: Polynomial = (0,) * len(a)
    for coefficient in reversed(a):
        value = multiply(value, b)
        value = ((value[0] + coefficient) % MODULUS, *value[1:])
    return value
