"""Parameters of the synthetic tasks."""

from typing import Annotated

from pydantic import Field

from mtp_dist.config.base import NonNegativeInt, PositiveInt, Section

SYNTHETIC_PREFIX = "synthetic/"
"""Start of the path of a task's documents, and of the name of its tokenizer."""


class SyntheticConfig(Section):
    """Parameters of a synthetic task. Those that a task does not have must be left out; each task has defaults."""

    documents: PositiveInt = 20_000
    """Number of documents."""
    seed: NonNegativeInt = 0
    """Seed of the documents. Splits are disjoint whatever their seeds are."""
    names: Annotated[int, Field(ge=2, le=8)] | None = None
    """`induction`: names per story."""
    new_names: Annotated[float, Field(ge=0, le=1)] | None = None
    """`induction`: fraction of the training stories with random names. The other stories share 20 names, in which the
    first token determines the second. Held-out stories have random names."""
    operations: Annotated[int, Field(ge=1, le=50)] | None = None
    """`arithmetic`: largest number of operations per expression; all numbers from 1 on are equally frequent."""
    coefficients: Annotated[int, Field(ge=2, le=10)] | None = None
    """`arithmetic`: coefficients per polynomial, k for F7[X]/(X^k)."""
    people: Annotated[int, Field(ge=2, le=12)] | None = None
    """`agreement`: people per text."""
    adjectives: Annotated[int, Field(ge=0, le=4)] | None = None
    """`agreement`: adjectives between article and noun."""
    degree: Annotated[int, Field(ge=2, le=50)] | None = None
    """`star-graph`: paths d of a graph G(d, l)."""
    length: Annotated[int, Field(ge=2, le=16)] | None = None
    """`star-graph`: nodes l of each path, the start included. `choices`: words of a phrase that follow from its first
    one, this one included."""
    nodes: Annotated[int, Field(ge=3, le=100)] | None = None
    """`star-graph`: number of labels from which a graph's nodes are drawn."""
    branches: Annotated[int, Field(ge=2, le=16)] | None = None
    """`choices`: number of phrases that may follow a phrase."""
