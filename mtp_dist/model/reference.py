"""The whole model and its loss in plain PyTorch, unsharded: what every layout must agree with.

Written from the formulas, with explicit attention and without any of the parallel layers, so that an error in those
cannot hide here. It is also the model that small checkpoints are sampled with.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtp_dist.config import Config
from mtp_dist.model.parameters import initial_weight, parameter_shapes
from mtp_dist.model.rope import rope_inv_freq
from mtp_dist.model.targets import IGNORE_INDEX


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary position embedding of `[B, heads, S, head_dim]`: channel i turns with channel i + head_dim/2."""
    positions = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies.to(x.device))
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


TOKEN_ORDER = 0
"""Its place among the heads' logits."""


class ReferenceModel(nn.Module):
    """Trunk and n heads of any kind with the weights of `parameter_shapes`, whole, under their global names."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor] | None = None) -> None:
        """With the initial weights of `config.run.seed`, or with the given ones by global name."""
        super().__init__()
        self.config = config
        self.rope_inv_freq = rope_inv_freq(config.model)  # no buffer: fp32 whatever the weights become
        shapes = parameter_shapes(config)
        given = weights or {name: initial_weight(config, name, shape) for name, shape in shapes.items()}
        self.weights = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(given[name]) for name in shapes})

    def weight(self, name: str) -> Tensor:
        return self.weights[name.replace(".", "/")]

    def named_weights(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): weight for name, weight in self.weights.items()}

    def forward(self, samples: Tensor, length: int | None = None, documents: Tensor | None = None) -> dict[int, Tensor]:
        """Samples `[B, S + lookahead]` -> logits `[B, S, V]` by head; S is `length`, by default that of samples.

        With token-order prediction its logits are those of TOKEN_ORDER. Only `sequential` heads read tokens beyond S.
        Where `documents`, shaped like samples, are given, positions attend only to their own.
        """
        unseen = _unseen(samples[:, :length], None if documents is None else documents[:, :length])
        states = self._states(self.trunk(samples[:, :length], unseen), samples, unseen)
        logits = {head: self._logits(head, state) for head, state in states.items()}
        if self.config.heads.token_order:
            logits[TOKEN_ORDER] = self._hidden(1, states[1]) @ self.weight("token_order.weight").T
        return logits

    def next_token_logits(self, tokens: Tensor) -> Tensor:
        """Head 1's logits `[B, S, V]` for tokens `[B, S]`."""
        heads = self.config.heads
        last = heads.count if heads.kind == "anticausal" else 1
        unseen = _unseen(tokens)
        return self._logits(1, self._states(self.trunk(tokens, unseen), tokens, unseen, last)[1])

    def trunk(self, tokens: Tensor, unseen: Tensor) -> Tensor:
        """Tokens `[B, S]` -> z `[B, S, D]`."""
        hidden = F.embedding(tokens, self.weight("embedding.weight"))
        for index in range(self.config.model.trunk_layers):
            hidden = self._recomputed_layer(f"trunk.{index}", hidden, unseen)
        return hidden

    def _states(self, z: Tensor, samples: Tensor, unseen: Tensor, last: int | None = None) -> dict[int, Tensor]:
        """What heads 1..last make of z, by the formulas of docs/heads.md."""
        heads, states = self.config.heads, dict[int, Tensor]()
        numbers = range(1, (last or heads.count) + 1)
        for k in reversed(numbers) if heads.kind == "anticausal" else numbers:
            before = z
            if heads.kind in ("causal", "sequential") and k > 1:
                before = states[k - 1]
            if heads.kind == "anticausal" and k < heads.count:
                before = states[k + 1]
            if heads.detach and k > 1 and (k == 2 or before is z):
                before = before.detach()
            states[k] = self._state(k, before, samples, unseen)
        return states

    def _state(self, k: int, before: Tensor, samples: Tensor, unseen: Tensor) -> Tensor:
        heads, eps = self.config.heads, self.config.model.norm_eps
        if heads.kind == "linear":
            return before @ self.weight(f"heads.{k}.linear.weight").T
        if heads.kind == "mlp" or (heads.kind == "sequential" and k == 1):
            return before
        name = f"heads.{k}"
        if heads.kind == "sequential":
            name = "heads.repeated" if heads.repeated else name
            tokens = samples[:, k - 1 : k - 1 + before.shape[1]]
            embedded = F.embedding(tokens, self.weight("embedding.weight"))
            normed = [_rms_norm(embedded, self.weight(f"{name}.enorm.weight"), eps)]
            normed += [_rms_norm(before, self.weight(f"{name}.hnorm.weight"), eps)]
            before = torch.cat(normed, -1) @ self.weight(f"{name}.eh_proj.weight").T
            name += ".layers"
        for depth in range(heads.layers_per_head):
            before = self._recomputed_layer(f"{name}.{depth}", before, unseen)
        return before

    def _logits(self, k: int, state: Tensor) -> Tensor:
        return self._hidden(k, state) @ self.weight(self._unembedding(k)).T

    def _hidden(self, k: int, state: Tensor) -> Tensor:
        hidden = _rms_norm(state, self.weight("final_norm.weight"), self.config.model.norm_eps)
        if self.config.heads.kind == "mlp" and k > 1:
            hidden = hidden + F.silu(hidden @ self.weight(f"heads.{k}.linear.weight").T)
        return hidden

    def _unembedding(self, k: int) -> str:
        if self.config.heads.unembedding == "separate":
            return f"unembeddings.{k}.weight"
        return "embedding.weight" if self.config.model.tie_embeddings else "unembedding.weight"

    def _recomputed_layer(self, name: str, hidden: Tensor, unseen: Tensor) -> Tensor:
        """Apply `_layer` so that the attention scores `[B, heads, S, S]` of only one layer are in memory."""
        if not torch.is_grad_enabled():
            return self._layer(name, hidden, unseen)
        output: Tensor = checkpoint(self._layer, name, hidden, unseen, use_reentrant=False, preserve_rng_state=False)
        return output

    def _layer(self, name: str, hidden: Tensor, unseen: Tensor) -> Tensor:
        eps = self.config.model.norm_eps
        normed = _rms_norm(hidden, self.weight(f"{name}.input_layernorm.weight"), eps)
        hidden = hidden + self._attention(name, normed, unseen)
        normed = _rms_norm(hidden, self.weight(f"{name}.pre_mlp_layernorm.weight"), eps)
        gate, linear = (normed @ self.weight(f"{name}.mlp.linear_fc1.weight").T).chunk(2, -1)
        return hidden + (F.silu(gate) * linear) @ self.weight(f"{name}.mlp.linear_fc2.weight").T

    def _attention(self, name: str, hidden: Tensor, unseen: Tensor) -> Tensor:
        model = self.config.model
        batch, length, _ = hidden.shape
        queries = model.num_attention_heads // model.query_groups
        fused = hidden @ self.weight(f"{name}.self_attention.linear_qkv.weight").T
        fused = fused.view(batch, length, model.query_groups, queries + 2, model.head_dim)
        query, key, value = fused.split([queries, 1, 1], 3)
        query = _rotate(query.reshape(batch, length, -1, model.head_dim).transpose(1, 2), self.rope_inv_freq)
        key = _rotate(key.squeeze(3).transpose(1, 2), self.rope_inv_freq).repeat_interleave(queries, 1)
        value = value.squeeze(3).transpose(1, 2).repeat_interleave(queries, 1)
        scores = query @ key.transpose(-1, -2) * model.head_dim**-0.5
        context = scores.masked_fill(unseen, float("-inf")).softmax(-1) @ value
        return context.transpose(1, 2).flatten(2) @ self.weight(f"{name}.self_attention.linear_proj.weight").T


def _unseen(tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """Which positions do not see which, `[S, S]` or `[B, 1, S, S]`: the later ones and, where given, other documents.

    No position starts anew with a document: rotary embeddings see only how far two positions lie apart.
    """
    length = tokens.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
    return later if documents is None else later | (documents[:, None, :, None] != documents[:, None, None, :])


class ReferenceLosses(NamedTuple):
    """Of one global batch: sums over the valid targets by their number, 0 where a head has none."""

    losses: Tensor
    """`[n]`: L_k."""
    distillation: Tensor
    """`[n]`: cross-entropies to head 1's distribution; 0 for head 1 itself."""
    objectives: Tensor
    """`[n]`: each head's part of what is minimized, with the z-loss and the distillation, before its weight w_k."""
    token_order: Tensor
    """Cross-entropy to the order of the upcoming tokens, a scalar, before its weight."""


def reference_losses(
    model: ReferenceModel,
    samples: Tensor,
    targets: Tensor,
    documents: Tensor | None = None,
    counts: Tensor | None = None,
) -> ReferenceLosses:
    """samples `[B, S + lookahead]`, targets `[n, B, S]` with IGNORE_INDEX where none counts.

    documents, shaped like samples: which one each token lies in, for a configuration that stops at them.
    counts `[n]`: numbers of valid targets to divide by, if these samples are a part of the batch.
    """
    counts = (targets != IGNORE_INDEX).sum((1, 2)) if counts is None else counts
    heads, data = model.config.heads, model.config.data
    losses, distillation, objectives = [], [], []
    all_logits = model(samples, targets.shape[-1], None if data.attention_across_documents else documents)
    for k, target in enumerate(targets, 1):
        logits, valid = all_logits[k], target != IGNORE_INDEX
        total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        squares = logits.logsumexp(-1).square().where(valid, 0.0).sum()
        taught = torch.zeros_like(total)
        if heads.distillation and k > 1:
            taught = _distillation_sum(all_logits[1], logits, valid, heads.distances[k - 1], heads.distillation_top)
        targets_of_head = counts[k - 1].clamp(min=1)
        losses.append(total / targets_of_head)
        distillation.append(taught / targets_of_head)
        objectives.append((total + heads.z_loss * squares + heads.distillation * taught) / targets_of_head)
    order = targets.new_zeros((), dtype=losses[0].dtype)
    if heads.token_order:
        valid = targets[0] != IGNORE_INDEX
        ranked = None if data.loss_across_documents else documents
        scores = _token_order_scores(samples, all_logits[TOKEN_ORDER], heads.token_order_window, ranked)
        probabilities = scores.softmax(-1).where(valid.unsqueeze(-1), 0.0)  # NaN where nothing is ranked
        cross_entropies = -(probabilities * all_logits[TOKEN_ORDER].log_softmax(-1)).sum(-1)
        order = cross_entropies.sum() / counts[0].clamp(min=1)
    return ReferenceLosses(torch.stack(losses), torch.stack(distillation), torch.stack(objectives), order)


def _distillation_sum(teacher: Tensor, logits: Tensor, valid: Tensor, distance: int, top: int) -> Tensor:
    """Cross-entropies to the teacher's `top` most probable tokens, where it speaks of the same token as the head."""
    later = distance - 1
    best, entries = teacher.detach()[:, later:].topk(min(top, teacher.shape[-1]), -1)
    length = entries.shape[1]
    log_probabilities = logits[:, :length].log_softmax(-1).gather(-1, entries)
    return -(best.softmax(-1) * log_probabilities).sum(-1).where(valid[:, :length], 0.0).sum()


def _token_order_scores(samples: Tensor, like: Tensor, window: int, documents: Tensor | None) -> Tensor:
    """`[B, S, V]`, like `like`: window - d for tokens whose next occurrence is d <= window ahead, -inf for the others.

    Where `documents` are given, occurrences in another one are none.
    """
    scores = torch.full_like(like, -torch.inf, requires_grad=False)
    length = like.shape[1]
    for distance in range(window, 0, -1):  # the nearest occurrence is written last
        ahead = slice(distance, distance + length)
        upcoming = samples[:, ahead].unsqueeze(-1)
        score = torch.full_like(scores[..., :1], window - distance)
        if documents is not None:
            elsewhere = (documents[:, ahead] != documents[:, :length]).unsqueeze(-1)
            score = score.where(~elsewhere, scores.gather(-1, upcoming))
        scores = scores.scatter(-1, upcoming, score)
    return scores
