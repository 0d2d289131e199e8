"""The heads as the pipeline's last layer, or as the last layers of several stages."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.distributed.topology import tp_group
from mtp_dist.loss.acceptance import GreedyTokens, draft_acceptance_sums
from mtp_dist.loss.naive import naive_heads_loss
from mtp_dist.loss.objective import Distillation, HeadSums, Objective, Vocabulary
from mtp_dist.loss.sequential import sequential_heads_loss
from mtp_dist.loss.token_order import token_order_targets
from mtp_dist.model.heads import HeadContext, PredictionHeads
from mtp_dist.model.layers import AttentionInputs
from mtp_dist.model.targets import IGNORE_INDEX, MicroBatch


class _ZeroGradient(torch.autograd.Function):
    """z, with a gradient of 0 for a weight: DeepSpeed adds up a tied weight's gradients, which each stage must have."""

    @staticmethod
    def forward(ctx: Any, trunk_output: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return trunk_output.view_as(trunk_output)

    @staticmethod
    def backward(ctx: Any, grad_trunk_output: Tensor) -> tuple[Tensor, Tensor]:
        return grad_trunk_output, torch.zeros_like(ctx.weight)


class EarlierHeads(NamedTuple):
    """What the heads of a stage receive from those of the stages before, in addition to z."""

    loss: Tensor
    """Sum of their losses, a scalar in fp32. The last stage adds it to its own, so that the scale of the whole loss
    comes back to their stages as a gradient."""
    token_ids: Tensor | None = None
    """Their most probable tokens in an evaluation, see `GreedyTokens`. In fp32, which has the ids of any vocabulary,
    because DeepSpeed's receive buffers have gradients."""


class HeadsWithLoss(PredictionHeads):
    """The heads as the pipeline's last layer: z in, the loss of a micro-batch out.

    The loss is inside the layer because DeepSpeed's bf16 optimizer gives no update to a parameter that is used only
    in `loss_fn`.
    """

    def __init__(self, config: Config, megatron: TransformerConfig, numbers: Sequence[int] = ()) -> None:
        super().__init__(config, megatron, numbers)
        self.vocabulary = Vocabulary(config.vocab_size, IGNORE_INDEX, tp_group())
        self.distances = config.heads.distances
        self.begin(torch.zeros(config.heads.count + 1), config.heads.count)

    def begin(self, scales: Tensor, active_heads: int) -> None:
        """Start a batch.

        scales: `[n + 1]`, fp32, of the rows of `sums` in the loss. active_heads: heads 1..active_heads run.
        """
        self.scales, self.active_heads = scales, active_heads
        self.sums = HeadSums(scales.new_zeros(len(scales), len(HeadSums.COLUMNS), dtype=torch.float64))
        """Sums over the batch's micro-batches so far, fp64."""
        self.acceptance_sums = scales.new_zeros(self.distances[-1] - 1, 2, dtype=torch.float64)
        """The same of `draft_acceptance_sums`; 0 in training."""

    def forward(
        self,
        inputs: Tensor | tuple[Tensor, Tensor],
        micro_batch: MicroBatch,
        attention: AttentionInputs,
        weighted_sum: Tensor | None = None,
        earlier: EarlierHeads | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Map z `[S, B, D]`, or (z, the embedding's weight `[V/TP, D]`), to the loss, a scalar.

        weighted_sum: `[S, B, D]`, that of the trunk's hidden states, which heads 2..n read instead of z.
        earlier: of the heads on earlier stages.
        """
        trunk_output, embedding_weight = inputs if isinstance(inputs, tuple) else (inputs, None)
        if weighted_sum is not None:
            trunk_output = torch.stack([trunk_output, weighted_sum])
        loss, greedy = self._run(trunk_output, embedding_weight, micro_batch, attention, earlier)
        if greedy:
            self._add_acceptance(greedy, micro_batch)
        return loss

    def _run(
        self,
        trunk_output: Tensor,
        embedding_weight: Tensor | None,
        micro_batch: MicroBatch,
        attention: AttentionInputs,
        earlier: EarlierHeads | None,
    ) -> tuple[Tensor, GreedyTokens | None]:
        """Return the loss of the heads up to this stage and, in an evaluation, their most probable tokens."""
        greedy = None if torch.is_grad_enabled() else self._greedy_tokens(micro_batch, earlier)
        loss = self._loss(trunk_output, embedding_weight, micro_batch, attention, greedy)
        return loss if earlier is None else loss + earlier.loss, greedy

    def _loss(
        self,
        trunk_output: Tensor,
        embedding_weight: Tensor | None,
        micro_batch: MicroBatch,
        attention: AttentionInputs,
        greedy: GreedyTokens | None,
    ) -> Tensor:
        """Return the loss of this stage's heads and add to `sums`."""
        if (weight := self._tied_weight_without_loss(embedding_weight)) is not None:
            trunk_output = _ZeroGradient.apply(trunk_output, weight)  # type: ignore[no-untyped-call]
        context = HeadContext(micro_batch.samples, attention, embedding_weight)
        mode, objective = self.config.heads.loss_mode, self._objective(micro_batch, greedy)
        sums = objective.zero_sums(trunk_output.dtype)
        if mode == "naive":
            loss = naive_heads_loss(self, trunk_output, context, objective, sums)
        else:
            loss = sequential_heads_loss(mode, self, trunk_output, context, objective, sums)
        self.sums.tensor.add_(sums.tensor)
        return loss

    def _tied_weight_without_loss(self, embedding_weight: Tensor | None) -> Tensor | None:
        """Return the weight that this stage has in common with another one and that no loss of its heads trains."""
        if self.isolated.issuperset(self.keys) and not self.separate:  # heads 2..n only
            return embedding_weight if self.config.model.tie_embeddings else self.unembedding.weight
        return embedding_weight if self.isolated and not self.config.model.tie_embeddings else None

    def _greedy_tokens(self, micro_batch: MicroBatch, earlier: EarlierHeads | None) -> GreedyTokens:
        heads, batch, length = micro_batch.targets.shape
        greedy = GreedyTokens(heads, length, batch, self.vocabulary, self.scales.device)
        if earlier is not None:
            assert earlier.token_ids is not None, "an evaluation"
            greedy.token_ids += earlier.token_ids.long()
        return greedy

    def _add_acceptance(self, greedy: GreedyTokens, micro_batch: MicroBatch) -> None:
        valid = (micro_batch.targets != IGNORE_INDEX).transpose(1, 2)
        sums = draft_acceptance_sums(greedy.token_ids, valid, self.distances[: self.active_heads])
        self.acceptance_sums[: len(sums)] += sums

    def _objective(self, micro_batch: MicroBatch, greedy: GreedyTokens | None) -> Objective:
        samples, targets, documents = micro_batch
        heads, length = self.config.heads, self.config.train.sequence_length
        distillation, token_order = None, None
        if heads.distillation or heads.total_variation:
            distillation = Distillation(
                heads.distillation, heads.total_variation, heads.distillation_top, heads.distances
            )
        if heads.token_order:
            valid = targets[0] != IGNORE_INDEX
            ranked = None if self.config.data.loss_across_documents else documents
            token_order = token_order_targets(samples, length, heads.token_order_window, valid, ranked)
        return Objective(
            targets=targets,
            active_heads=self.active_heads,
            scales=self.scales,
            vocabulary=self.vocabulary,
            z_loss=heads.z_loss,
            chunk_tokens=heads.chunk_tokens,
            sequence_parallel=self.config.parallel.sequence,
            distillation=distillation,
            token_order=token_order,
            on_logits=greedy.record if greedy else None,
        )


class _WithTrunkGradient(torch.autograd.Function):
    """The loss of a stage's heads, whose backward pass gives z also the gradient that z's copy got before."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, trunk_output: Tensor, sent: Tensor) -> Tensor:
        ctx.sent = sent
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_trunk_output, ctx.sent.grad = ctx.sent.grad, None
        return grad_loss, grad_trunk_output, None


class InnerHeadsWithLoss(HeadsWithLoss):
    """The heads of a stage that sends z and the loss to a stage with other heads."""

    def forward(
        self,
        inputs: Tensor | tuple[Tensor, Tensor],
        micro_batch: MicroBatch,
        attention: AttentionInputs,
        weighted_sum: Tensor | None = None,
        earlier: EarlierHeads | None = None,
    ) -> tuple[Tensor, ...]:
        """Map z to itself and the fields of EarlierHeads for the next stage."""
        trunk_output, embedding_weight = inputs if isinstance(inputs, tuple) else (inputs, None)
        loss, greedy = self._run(trunk_output, embedding_weight, micro_batch, attention, earlier)
        if greedy:
            return trunk_output, loss, greedy.token_ids.float()
        # DeepSpeed runs backward from each of the tensors that a stage sends, in this order: from z as it is, it would
        # run through the trunk's layers twice.
        sent = trunk_output.detach().requires_grad_()
        return sent, _WithTrunkGradient.apply(loss, trunk_output, sent)  # type: ignore[no-untyped-call]
