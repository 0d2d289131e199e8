"""Bytes and FLOPs of the forward passes of decoding, and the time that a device needs for them at least."""

from __future__ import annotations

from dataclasses import dataclass

from mtp_dist.config import Config
from mtp_dist.config.heads import condition_rank, drafting_head
from mtp_dist.planner.flops import block_matrices, layer_matrices


@dataclass(frozen=True)
class Device:
    """The measured speed of a device."""

    bytes_per_second: float
    """Rate at which a matrix-vector product reads its matrix."""
    flops_per_second: float
    """Rate of the product of two large matrices."""


@dataclass(frozen=True)
class PassCost:
    """The memory traffic and the arithmetic of one forward pass of a batch."""

    bytes: float
    """Weights, keys and values that are read from memory, each once per use."""
    flops: float

    def seconds(self, device: Device) -> float:
        """Return the time on a device that reads and computes at once."""
        return max(self.bytes / device.bytes_per_second, self.flops / device.flops_per_second)


@dataclass(frozen=True)
class DecodingCosts:
    """The costs of decoding a batch of texts with a model."""

    config: Config
    batch_size: int
    element_bytes: int
    """Bytes of one number of the weights and of the cache."""

    def prompt(self, tokens: int) -> PassCost:
        """Return the cost of trunk and head 1 at all positions of the prompts and of one prediction per text."""
        return self._cost(positions=tokens, predictions=1, context=tokens)

    def step(self, length: int, context: float, gained: float, nodes: int | None = None) -> PassCost:
        """Return the cost of drafting up to distance `length` and of verifying the drafts; 1 is plain decoding.

        context: positions that are attended to. gained: positions per text since the pass before, which the heads
        process. nodes: number of positions to verify if the drafts are a tree, by default `length`.
        """
        verified = nodes or length
        head = drafting_head(self.config.heads.distances, length)
        return self._cost(verified, verified, context, draft_heads=head - 1, gained=gained, drafts=length - 1)

    def _cost(
        self,
        positions: float,
        predictions: int,
        context: float,
        draft_heads: int = 0,
        gained: float = 0.0,
        drafts: int = 0,
    ) -> PassCost:
        """Return the cost of trunk and head 1 at some positions per text, and of draft heads at those gained."""
        heads, model = self.config.heads, self.config.model
        through_heads = heads.traits.reads == "next head"  # then head 1's blocks are those of all heads
        first_blocks = heads.count if through_heads else heads.active_blocks(1)
        draft_blocks = 0 if through_heads else draft_heads
        unembedding = self.config.vocab_size * model.hidden_size
        verifying = model.trunk_layers * layer_matrices(model) + first_blocks * block_matrices(self.config)
        drafting = draft_blocks * block_matrices(self.config)
        layers = model.trunk_layers + first_blocks * heads.block_layers
        draft_layers = draft_blocks * heads.block_layers
        slot = 2 * model.query_groups * model.head_dim  # a key and a value
        # Drafts that do not depend on one another are one product with the unembedding that they share.
        at_once = heads.unembedding == "shared" and not heads.traits.embeds_tokens
        # By head, the product of unembedding and condition is one matrix.
        conditions = drafts * self.config.vocab_size * condition_rank(heads, model.hidden_size)
        read = verifying + unembedding + drafting + conditions
        read += (min(drafts, 1) if at_once else drafts) * unembedding
        cached = self.batch_size * context * slot * (layers + draft_layers)
        products = positions * verifying + gained * drafting + conditions + (predictions + drafts) * unembedding
        attention = 2 * model.attention_size * context * (positions * layers + gained * draft_layers)
        return PassCost(self.element_bytes * (read + cached), 2 * self.batch_size * (products + attention))
