"""The unsharded model and its loss in plain PyTorch, which every layout must agree with.

It is written from the formulas, with explicit attention and without any of the parallel layers, so that it cannot share
an error with them. Small checkpoints are sampled with it too.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtp_dist.config import Config, ModelConfig
from mtp_dist.model.parameters import STATE_WEIGHTS, head_key, initial_weight, is_trained, parameter_shapes
from mtp_dist.model.rope import rope_attention_factor, rope_inv_freq
from mtp_dist.model.targets import IGNORE_INDEX


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * weight


def _layer_norm(hidden: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centered = hidden - hidden.mean(-1, keepdim=True)
    return centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + eps) * weight + bias


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x * 0.5**0.5)) / 2


def _rotate(x: Tensor, model: ModelConfig) -> Tensor:
    """Apply RoPE to `[B, heads, S, head_dim]`: of the first `rotary_dim` channels i and i + rotary_dim/2 are a pair."""
    length, factor = x.shape[-2], rope_attention_factor(model)
    positions = torch.arange(length, device=x.device, dtype=torch.float32)
    angles = torch.outer(positions, rope_inv_freq(model, length).to(x.device))
    cos, sin = (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)
    rotated, kept = x[..., : model.rotary_dim], x[..., model.rotary_dim :]
    first, second = rotated.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, kept], -1)


class ReferenceLogits(NamedTuple):
    """The logits of all heads, `[B, S, V]` each."""

    heads: dict[int, Tensor]
    """Logits of heads 1..n, by head."""
    token_order: Tensor | None
    """Logits of token-order prediction; None without it."""


class ReferenceModel(nn.Module):
    """Trunk and n heads of any kind with the full weights of `parameter_shapes` under their global names."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor] | None = None) -> None:
        """Use weights given by global name; by default the initial ones for `config.run.seed`."""
        super().__init__()
        self.config = config
        shapes = parameter_shapes(config)
        given = weights or {name: initial_weight(config, name, shape) for name, shape in shapes.items()}
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(given[name], is_trained(config, name)) for name in shapes}
        )

    def weight(self, name: str) -> Tensor:
        return self.weights[name.replace(".", "/")]

    def _shared_weight(self, name: str, k: int) -> Tensor:
        """Return a weight that head k shares with head 1; `heads.detach: full` keeps its loss from training it."""
        weight = self.weight(name)
        return weight.detach() if k > 1 and self.config.heads.detach == "full" else weight

    def named_weights(self) -> dict[str, nn.Parameter]:
        return {name.replace("/", "."): weight for name, weight in self.weights.items()}

    def forward(self, samples: Tensor, length: int | None = None, documents: Tensor | None = None) -> dict[int, Tensor]:
        """Return the logits `[B, S, V]` by head, see `logits`."""
        return self.logits(samples, length, documents).heads

    def logits(self, samples: Tensor, length: int | None = None, documents: Tensor | None = None) -> ReferenceLogits:
        """Return all logits for samples `[B, S + lookahead]`; S is `length`, by default that of samples.

        Only heads that read the tokens before their targets read those beyond S. If documents, shaped like samples, are
        given, positions attend only to their own document.
        """
        mask = self.attention_mask(samples[:, :length], None if documents is None else documents[:, :length])
        trunk_states = self.trunk_states(samples[:, :length], mask)
        states = self.pre_norm_hidden(trunk_states[-1], samples, mask, weighted_sum=self.weighted_sum(trunk_states))
        logits = {head: self.head_logits(head, hidden, samples) for head, hidden in states.items()}
        if not self.config.heads.token_order:
            return ReferenceLogits(logits, None)
        return ReferenceLogits(logits, self._normalize(1, states[1], samples) @ self.weight("token_order.weight").T)

    def next_token_logits(self, tokens: Tensor) -> Tensor:
        """Return head 1's logits `[B, S, V]` for tokens `[B, S]`."""
        heads = self.config.heads
        last = heads.count if heads.traits.reads == "next head" else 1
        mask = self.attention_mask(tokens)
        return self.head_logits(1, self.pre_norm_hidden(self.trunk(tokens, mask), tokens, mask, last)[1], tokens)

    def attention_mask(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return `[S, S]` or `[B, 1, S, S]`, True if attention is masked: later positions, those that have left the
        window of `model.sliding_window`, and other documents.

        Positions do not restart with a document: RoPE depends only on the distance of two positions.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        distances = positions[:, None] - positions
        masked, window = distances < 0, self.config.model.sliding_window
        if window is not None:
            masked |= distances >= window
        return masked if documents is None else masked | (documents[:, None, :, None] != documents[:, None, None, :])

    def trunk(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the trunk's output z `[B, S, D]` for tokens `[B, S]`."""
        return self.trunk_states(tokens, mask)[-1]

    def trunk_states(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """Return the outputs `[B, S, D]` of the embedding and of every trunk layer for tokens `[B, S]`."""
        states = [F.embedding(tokens, self.weight("embedding.weight"))]
        for index in range(self.config.model.trunk_layers):
            states.append(self._recomputed_layer(f"trunk.{index}", states[-1], mask))
        return states

    def weighted_sum(self, trunk_states: Sequence[Tensor]) -> Tensor | None:
        """Return what heads 2..n read instead of z with `heads.weighted_hidden_states`, None without."""
        if not self.config.heads.weighted_hidden_states:
            return None
        stacked, weights = torch.stack([*trunk_states]), self.weight(STATE_WEIGHTS).softmax(0)
        return torch.einsum("l,lbsd->bsd", weights, stacked.detach() if self.config.heads.detach else stacked)

    def pre_norm_hidden(
        self,
        z: Tensor,
        samples: Tensor,
        mask: Tensor,
        last: int | None = None,
        weighted_sum: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Return the hidden states of heads 1..last before the final norm, by the formulas of docs/heads.md."""
        heads, states = self.config.heads, dict[int, Tensor]()
        numbers = range(1, (last or heads.count) + 1)
        for k in reversed(numbers) if heads.traits.reads == "next head" else numbers:
            before = {  # by kind, not by `reads`, so that an error in the table of kinds is not in both models
                "parallel": z,
                "causal": states.get(k - 1, z),
                "anticausal": states.get(k + 1, z),
                "linear": z,
                "mlp": z,
                "sequential": states.get(k - 1, z),
            }[heads.kind]
            if k > 1 and weighted_sum is not None:
                before = weighted_sum
            elif heads.detach and k > 1 and (k == 2 or before is z):
                before = before.detach()
            states[k] = self._state(k, before, samples, mask)
        return states

    def _state(self, k: int, before: Tensor, samples: Tensor, mask: Tensor) -> Tensor:
        heads = self.config.heads
        name = f"heads.{head_key(heads, k)}"
        match heads.kind:
            case "parallel" | "causal" | "anticausal":
                pass
            case "linear":
                return before @ self.weight(f"{name}.linear.weight").T
            case "mlp":  # its blocks are in `_normalize`
                return before
            case "sequential":
                if k == 1:
                    return before
                tokens = samples[:, k - 1 : k - 1 + before.shape[1]]
                embedded = F.embedding(tokens, self._shared_weight("embedding.weight", k))
                embedded = self._norm(f"{name}.enorm", embedded)
                before = self._norm(f"{name}.hnorm", before)
                before = torch.cat([embedded, before], -1) @ self.weight(f"{name}.eh_proj.weight").T
                name += ".layers"
            case _:
                assert_never(heads.kind)
        for depth in range(heads.layers_per_head):
            before = self._recomputed_layer(f"{name}.{depth}", before, mask)
        return before

    def head_logits(self, k: int, hidden: Tensor, samples: Tensor) -> Tensor:
        """Return the logits `[B, S, V]` of head k for its hidden states before the final norm."""
        return self._normalize(k, hidden, samples) @ self._unembedding(k).T

    def final_norm(self, hidden: Tensor, k: int = 1) -> Tensor:
        """Return the norm of head k's hidden states `[B, S, D]`."""
        return self._norm("final_norm", hidden, k)

    def _norm(self, name: str, hidden: Tensor, k: int = 1) -> Tensor:
        """Return the norm of that name. k: the head, if its weights are those that head k shares with head 1."""
        weight, eps = self._shared_weight(f"{name}.weight", k), self.config.model.norm_eps
        if self.config.model.normalization == "rmsnorm":
            return _rms_norm(hidden, weight, eps)
        return _layer_norm(hidden, weight, self._shared_weight(f"{name}.bias", k), eps)

    def _normalize(self, k: int, hidden: Tensor, samples: Tensor) -> Tensor:
        hidden = self.final_norm(hidden, k)
        if self.config.heads.kind == "mlp" and k > 1:
            hidden = hidden + F.silu(hidden @ self.weight(f"heads.{k}.linear.weight").T)
        if self.config.heads.condition == "previous_token" and k > 1:
            target = self.config.heads.distances[k - 1]
            tokens = samples[:, target - 1 : target - 1 + hidden.shape[1]]
            embedded = F.embedding(tokens, self.weight("condition.embedding.weight"))
            hidden = hidden + embedded @ self.weight(f"condition.{k}.weight").T
        return hidden

    def _unembedding(self, k: int) -> Tensor:
        if self.config.heads.unembedding == "separate":
            return self.weight(f"unembeddings.{k}.weight")
        return self._shared_weight("embedding.weight" if self.config.model.tie_embeddings else "unembedding.weight", k)

    def _recomputed_layer(self, name: str, hidden: Tensor, mask: Tensor) -> Tensor:
        """Apply `_layer` with the attention scores `[B, heads, S, S]` of only one layer in memory."""
        if not torch.is_grad_enabled():
            return self._layer(name, hidden, mask)
        output: Tensor = checkpoint(self._layer, name, hidden, mask, use_reentrant=False, preserve_rng_state=False)
        return output

    def _layer(self, name: str, hidden: Tensor, mask: Tensor) -> Tensor:
        attended = hidden + self._attention(name, self._norm(f"{name}.input_layernorm", hidden), mask)
        mlp_input = hidden if self.config.model.parallel_residual else attended
        inner = self._linear(f"{name}.mlp.linear_fc1", self._norm(f"{name}.pre_mlp_layernorm", mlp_input))
        if self.config.model.mlp == "swiglu":
            gate, linear = inner.chunk(2, -1)
            inner = F.silu(gate) * linear
        else:
            inner = _gelu(inner)
        return attended + self._linear(f"{name}.mlp.linear_fc2", inner)

    def _linear(self, name: str, hidden: Tensor) -> Tensor:
        """Return W x, plus the bias if there is one and (alpha / rank) B A x with a low-rank adapter."""
        output = hidden @ self.weight(f"{name}.weight").T
        if f"{name}.bias".replace(".", "/") in self.weights:
            output = output + self.weight(f"{name}.bias")
        low_rank = self.config.train.low_rank
        if low_rank is None or f"{name}/lora_A/weight".replace(".", "/") not in self.weights:
            return output
        adapter = self.weight(f"{name}.lora_B.weight") @ self.weight(f"{name}.lora_A.weight")
        return output + low_rank.alpha / low_rank.rank * hidden @ adapter.T

    def _attention(self, name: str, hidden: Tensor, mask: Tensor) -> Tensor:
        model = self.config.model
        batch, length, _ = hidden.shape
        queries = model.num_attention_heads // model.query_groups
        fused = self._linear(f"{name}.self_attention.linear_qkv", hidden)
        fused = fused.view(batch, length, model.query_groups, queries + 2, model.head_dim)
        query, key, value = fused.split([queries, 1, 1], 3)
        if model.qk_norm:
            query = _rms_norm(query, self.weight(f"{name}.self_attention.q_layernorm.weight"), model.norm_eps)
            key = _rms_norm(key, self.weight(f"{name}.self_attention.k_layernorm.weight"), model.norm_eps)
        query = _rotate(query.reshape(batch, length, -1, model.head_dim).transpose(1, 2), model)
        key = _rotate(key.squeeze(3).transpose(1, 2), model).repeat_interleave(queries, 1)
        value = value.squeeze(3).transpose(1, 2).repeat_interleave(queries, 1)
        scores = query @ key.transpose(-1, -2) * model.head_dim**-0.5
        context = scores.masked_fill(mask, float("-inf")).softmax(-1) @ value
        return self._linear(f"{name}.self_attention.linear_proj", context.transpose(1, 2).flatten(2))


class ReferenceLosses(NamedTuple):
    """Losses of one global batch: means over the valid targets, 0 for a head without any."""

    losses: Tensor
    """`[n]`: L_k."""
    distillation: Tensor
    """`[n]`: cross-entropies to head 1's distribution; 0 for head 1 itself."""
    total_variation: Tensor
    """`[n]`: total variation distances to head 1's distribution; 0 for head 1 itself."""
    objectives: Tensor
    """`[n]`: each head's part of the minimized loss, with the z-loss and the losses to head 1's distribution, before
    its weight w_k."""
    token_order: Tensor
    """Cross-entropy to the order of the upcoming tokens, a scalar, before its weight."""


def reference_losses(
    model: ReferenceModel,
    samples: Tensor,
    targets: Tensor,
    documents: Tensor | None = None,
    counts: Tensor | None = None,
) -> ReferenceLosses:
    """Return the losses of samples `[B, S + lookahead]` and targets `[n, B, S]`, IGNORE_INDEX if a target is masked.

    documents, shaped like samples: index of each token's document, for a configuration that keeps documents apart.
    counts `[n]`: numbers of valid targets to divide by, if these samples are a part of the batch.
    """
    counts = (targets != IGNORE_INDEX).sum((1, 2)) if counts is None else counts
    heads, data = model.config.heads, model.config.data
    losses, soft_losses, objectives = [], [], []
    attended = None if data.attention_across_documents else documents
    logits_by_head, order_logits = model.logits(samples, targets.shape[-1], attended)
    for k, target in enumerate(targets, 1):
        logits, valid = logits_by_head[k], target != IGNORE_INDEX
        total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        squares = logits.logsumexp(-1).square().where(valid, 0.0).sum()
        soft = torch.zeros_like(total).repeat(2)
        if k > 1 and (heads.distillation or heads.total_variation):
            soft = _soft_sums(logits_by_head[1], logits, valid, heads.distances[k - 1], heads.distillation_top)
        num_targets = counts[k - 1].clamp(min=1)
        losses.append(total / num_targets)
        soft_losses.append(soft / num_targets)
        weighted = heads.z_loss * squares + heads.distillation * soft[0] + heads.total_variation * soft[1]
        objectives.append((total + weighted) / num_targets)
    order = targets.new_zeros((), dtype=losses[0].dtype)
    if order_logits is not None:
        valid = targets[0] != IGNORE_INDEX
        ranked = None if data.loss_across_documents else documents
        scores = _token_order_scores(samples, order_logits, heads.token_order_window, ranked)
        probabilities = scores.softmax(-1).where(valid.unsqueeze(-1), 0.0)  # NaN if nothing is ranked
        cross_entropies = -(probabilities * order_logits.log_softmax(-1)).sum(-1)
        order = cross_entropies.sum() / counts[0].clamp(min=1)
    distillation, total_variation = torch.stack(soft_losses, 1)
    return ReferenceLosses(torch.stack(losses), distillation, total_variation, torch.stack(objectives), order)


def _soft_sums(teacher: Tensor, logits: Tensor, valid: Tensor, distance: int, top: int) -> Tensor:
    """Return the sums of cross-entropies and of total variation distances to the teacher's distribution.

    It is that of the teacher's `top` best tokens, at its position with the same target.
    """
    later = distance - 1
    best, token_ids = teacher.detach()[:, later:].topk(min(top, teacher.shape[-1]), -1)
    length = token_ids.shape[1]
    log_probabilities = logits[:, :length].log_softmax(-1)
    expected = torch.zeros_like(log_probabilities).scatter(-1, token_ids, best.softmax(-1))
    cross_entropies = -(expected * log_probabilities).sum(-1)
    distances = (expected - log_probabilities.exp()).abs().sum(-1) / 2
    return torch.stack([cross_entropies, distances]).where(valid[:, :length], 0.0).sum((1, 2))


def _token_order_scores(samples: Tensor, like: Tensor, window: int, documents: Tensor | None) -> Tensor:
    """Return scores `[B, S, V]`, shaped like `like`: window - d for tokens that next occur d <= window ahead, or -inf.

    If documents are given, occurrences in other documents do not count.
    """
    scores = torch.full_like(like, -torch.inf, requires_grad=False)
    length = like.shape[1]
    for distance in range(window, 0, -1):  # the nearest occurrence is written last
        ahead = slice(distance, distance + length)
        upcoming = samples[:, ahead].unsqueeze(-1)
        score = torch.full_like(scores[..., :1], window - distance)
        if documents is not None:
            other_document = (documents[:, ahead] != documents[:, :length]).unsqueeze(-1)
            score = score.where(~other_document, scores.gather(-1, upcoming))
        scores = scores.scatter(-1, upcoming, score)
    return scores
