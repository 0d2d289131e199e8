"""Trunk layers of each pipeline stage. The first stage also has the embedding, the last stage all heads."""

from mtp_dist.config import Config
from mtp_dist.planner.flops import layer_and_head_flops


def trunk_layers_per_stage(config: Config) -> tuple[int, ...]:
    """Return the number of trunk layers of each stage, first stage first.

    `balanced` makes the slowest stage as fast as possible: one trunk layer costs 1, the last stage also pays for the
    heads and for one unembedding per head, whose cost relative to a layer, which runs forward only if it is frozen, is
    that of their matmuls.
    """
    stages, layers = config.parallel.pipeline, config.model.trunk_layers
    if config.parallel.partition == "uniform":
        return (layers // stages,) * stages
    if config.parallel.partition != "balanced":
        return config.parallel.partition
    if stages == 1:
        return (layers,)
    layer_flops, head_flops = layer_and_head_flops(config)
    heads_cost = head_flops / layer_flops  # in trunk layers

    def slowest(last_layers: int) -> float:
        others = -(-(layers - last_layers) // (stages - 1))
        return max(others, last_layers + heads_cost)

    # Every stage except the last needs a layer of its own; of equal choices the fullest last stage leaves the others
    # the fewest layers, and with them the least memory for activations in flight.
    last = min(range(layers - stages + 2), key=lambda n: (slowest(n), -n))
    share, rest = divmod(layers - last, stages - 1)
    # The first stages keep the most micro-batches in flight, so the odd layers go to the later ones.
    return (*(share + (stage >= stages - 1 - rest) for stage in range(stages - 1)), last)
