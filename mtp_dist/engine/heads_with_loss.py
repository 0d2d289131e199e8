"""The heads as the pipeline's last layer."""

import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.distributed.topology import tp_group
from mtp_dist.loss.linear_cross_entropy import Vocabulary
from mtp_dist.loss.naive import naive_heads_loss
from mtp_dist.loss.objective import Distillation, Heads, HeadSums, Objective, TokenOrder
from mtp_dist.loss.sequential import sequential_heads_loss
from mtp_dist.loss.token_order import token_order_targets
from mtp_dist.model.heads import PredictionHeads, chains, detached_heads
from mtp_dist.model.targets import IGNORE_INDEX, MicroBatch
from mtp_dist.model.trunk import embed_tokens


class HeadsWithLoss(PredictionHeads):
    """The heads as the pipeline's last layer: z in, this micro-batch's share of the loss out.

    The loss is inside the layer because DeepSpeed's bf16 optimizer gives no update to a parameter that is used only
    in `loss_fn`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.scales = torch.zeros(config.heads.count)
        self.active = config.heads.count
        self.token_order_scale = torch.zeros(())
        self.sums = HeadSums.zeros(config.heads.count, self.scales.device)

    def begin(self, scales: Tensor, active: int, token_order_scale: Tensor) -> None:
        """Start a batch whose loss is sum_k scales[k-1] * (sum of head k's cross-entropies); scales `[n]`, fp32.

        Heads 1..active run. token_order_scale, a scalar, is that of the tokens' order, where it is predicted.
        """
        self.scales, self.active, self.token_order_scale = scales, active, token_order_scale
        self.sums = HeadSums.zeros(len(scales), scales.device)

    def forward(
        self, inputs: Tensor | tuple[Tensor, Tensor], micro_batch: MicroBatch, attention_bias: Tensor | None
    ) -> Tensor:
        """z `[S, B, D]`, or (z, the embedding's weight `[V/TP, D]`), -> a scalar. attention_bias: all layers'."""
        trunk_output, embedding = inputs if isinstance(inputs, tuple) else (inputs, None)
        micro_batch = micro_batch.to(trunk_output.device)
        heads, objective = self._heads(micro_batch.samples, embedding, attention_bias), self._objective(micro_batch)
        mode = self.config.heads.loss_mode
        if mode == "naive":
            return naive_heads_loss(heads, trunk_output, objective, self.sums)
        return sequential_heads_loss(mode, heads, trunk_output, objective, self.sums)

    def _heads(self, samples: Tensor, embedding: Tensor | None, attention_bias: Tensor | None) -> Heads:
        config = self.config
        modules = [self.unembedding_of(head) for head in range(1, config.heads.count + 1)]
        tied_weight = embedding if config.model.tie_embeddings else None
        weights: list[Tensor] = [*self.heads.parameters(), *self.final_norm.parameters()]
        if config.heads.kind == "sequential" and embedding is not None:
            weights.append(embedding)

        def embed(ahead: int) -> Tensor:
            assert embedding is not None, "the kind that embeds tokens has the embedding on the last stage"
            tokens = samples[:, ahead : ahead + config.train.sequence_length]
            return embed_tokens(embedding, tokens, config.parallel.sequence)

        return Heads(
            chains=chains(config.heads),
            detached=detached_heads(config.heads),
            state=lambda head, before: self.state(head, before, embed, attention_bias),
            hidden=self.hidden,
            logits=lambda head, hidden: modules[head - 1](hidden, tied_weight),
            weights=[weight for weight in weights if weight.requires_grad],
            unembeddings=[module.weight if tied_weight is None else tied_weight for module in modules],
            token_order=self.token_order.weight if config.heads.token_order else None,
        )

    def _objective(self, micro_batch: MicroBatch) -> Objective:
        samples, targets, documents = micro_batch
        heads, length = self.config.heads, self.config.train.sequence_length
        distillation, token_order = None, None
        if heads.distillation:
            distillation = Distillation(heads.distillation, heads.distillation_top, heads.distances)
        if heads.token_order:
            valid = targets[0] != IGNORE_INDEX
            ranked = None if self.config.data.loss_across_documents else documents
            order = token_order_targets(samples, length, heads.token_order_window, valid, ranked)
            token_order = TokenOrder(self.token_order_scale, order)
        return Objective(
            targets=targets,
            active=self.active,
            scales=self.scales,
            vocabulary=Vocabulary(self.config.vocab_size, IGNORE_INDEX, tp_group()),
            z_loss=self.config.heads.z_loss,
            chunk_tokens=self.config.heads.chunk_tokens,
            sequence_parallel=self.config.parallel.sequence,
            distillation=distillation,
            token_order=token_order,
        )
