"""The figures that decoding must reach, compared with those that were measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtp_dist.bench.decode.variants import ADAPTIVE, TRANSFORMERS

PLAIN_BATCHES = (1, 8)
"""Batch sizes at which plain decoding must be as fast as transformers'."""
LEAST_FRACTION = 0.9
"""Least fraction of the attainable speed-up per accepted token, at batch size 1."""

Row = Mapping[str, Any]


def bounds(rows: Sequence[Row], cache: Mapping[str, float], heads: int) -> list[dict[str, Any]]:
    """Return one entry per bound that the measured batch sizes decide."""
    return [
        *_speed_bounds(rows, heads),
        _bound("cache added by the heads", None, cache["added_share"], most=cache["layer_share"]),
    ]


def _speed_bounds(rows: Sequence[Row], heads: int) -> Iterator[dict[str, Any]]:
    for row in rows:
        batch, variant = row["batch"], row["variant"]
        if variant == TRANSFORMERS and batch in PLAIN_BATCHES:
            yield _bound("plain / transformers", batch, 1 / row["speed_up"], least=1.0)
        if variant in (f"k = {heads}", ADAPTIVE) and batch == 1:
            yield _bound(
                f"fraction of attainable, {variant}", batch, row["fraction_of_attainable"], least=LEAST_FRACTION
            )
        if variant == ADAPTIVE:
            yield _bound("adaptive / plain", batch, row["speed_up"], least=1.0)


def _bound(
    name: str, batch: int | None, value: float, least: float | None = None, most: float | None = None
) -> dict[str, Any]:
    holds = value >= least if least is not None else value <= (most or 0.0)
    return {"name": name, "batch": batch, "value": value, "at_least": least, "at_most": most, "holds": holds}
