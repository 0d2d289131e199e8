"""The whole model and its loss in plain PyTorch, unsharded: what every layout must agree with.

Written from the formulas, with explicit attention and without any of the parallel layers, so that an error in those
cannot hide here. It is also the model that small checkpoints are sampled with.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.config import Config
from mtp_dist.model.targets import IGNORE_INDEX
from mtp_dist.model.weights import initial_weight, parameter_shapes


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary position embedding of `[B, heads, S, head_dim]`: channel i turns with channel i + head_dim/2."""
    length, dim = x.shape[-2:]
    frequencies = theta ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angles = torch.outer(torch.arange(length, device=x.device, dtype=torch.float32), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class ReferenceModel(nn.Module):
    """Trunk and n parallel heads with the weights of `parameter_shapes`, whole, under their global names."""

    def __init__(self, config: Config, vocab_size: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """With the initial weights of `config.run.seed`, or with the given ones by global name."""
        super().__init__()
        self.config = config
        shapes = parameter_shapes(config, vocab_size)
        given = weights or {name: initial_weight(config, name, shape) for name, shape in shapes.items()}
        self.weights = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(given[name]) for name in shapes})

    def weight(self, name: str) -> Tensor:
        return self.weights[name.replace(".", "/")]

    def named_weights(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): weight for name, weight in self.weights.items()}

    def forward(self, tokens: Tensor, heads: int | None = None) -> list[Tensor]:
        """Tokens `[B, S]` -> logits `[B, S, V]` of heads 1..`heads` (of all when not given)."""
        trunk_output = F.embedding(tokens, self.weight("embedding.weight"))
        for index in range(self.config.model.trunk_layers):
            trunk_output = self._layer(f"trunk.{index}", trunk_output)
        return [self._head(k, trunk_output) for k in range(1, (heads or self.config.heads.count) + 1)]

    def _head(self, distance: int, trunk_output: Tensor) -> Tensor:
        hidden = trunk_output
        for depth in range(self.config.heads.layers_per_head):
            hidden = self._layer(f"heads.{distance}.{depth}", hidden)
        hidden = _rms_norm(hidden, self.weight("final_norm.weight"), self.config.model.norm_eps)
        return hidden @ self.weight(self._unembedding(distance)).T

    def _unembedding(self, distance: int) -> str:
        if self.config.heads.unembedding == "separate":
            return f"unembeddings.{distance}.weight"
        return "embedding.weight" if self.config.model.tie_embeddings else "unembedding.weight"

    def _layer(self, name: str, hidden: Tensor) -> Tensor:
        eps = self.config.model.norm_eps
        hidden = hidden + self._attention(name, _rms_norm(hidden, self.weight(f"{name}.input_layernorm.weight"), eps))
        normed = _rms_norm(hidden, self.weight(f"{name}.pre_mlp_layernorm.weight"), eps)
        gate, linear = (normed @ self.weight(f"{name}.mlp.linear_fc1.weight").T).chunk(2, -1)
        return hidden + (F.silu(gate) * linear) @ self.weight(f"{name}.mlp.linear_fc2.weight").T

    def _attention(self, name: str, hidden: Tensor) -> Tensor:
        model = self.config.model
        batch, length, _ = hidden.shape
        queries = model.num_attention_heads // model.query_groups
        fused = hidden @ self.weight(f"{name}.self_attention.linear_qkv.weight").T
        fused = fused.view(batch, length, model.query_groups, queries + 2, model.head_dim)
        query, key, value = fused.split([queries, 1, 1], 3)
        query = _rotate(query.reshape(batch, length, -1, model.head_dim).transpose(1, 2), model.rope_theta)
        key = _rotate(key.squeeze(3).transpose(1, 2), model.rope_theta).repeat_interleave(queries, 1)
        value = value.squeeze(3).transpose(1, 2).repeat_interleave(queries, 1)
        scores = query @ key.transpose(-1, -2) * model.head_dim**-0.5
        future = torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
        context = scores.masked_fill(future, float("-inf")).softmax(-1) @ value
        return context.transpose(1, 2).flatten(2) @ self.weight(f"{name}.self_attention.linear_proj.weight").T


def reference_losses(model: ReferenceModel, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """L_k `[n]` of one global batch, and each head's part of what is minimized, `[n]`: with the z-loss, unweighted.

    tokens `[B, S]`, targets `[n, B, S]` with IGNORE_INDEX where none counts. L_k is the sum of head k's cross-entropies
    over its valid targets by their number, and 0 where it has none.
    """
    losses, objectives = [], []
    for logits, target in zip(model(tokens), targets, strict=True):
        valid = (target != IGNORE_INDEX).sum().clamp(min=1)
        total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        squares = logits.logsumexp(-1).square().where(target != IGNORE_INDEX, 0.0).sum()
        losses.append(total / valid)
        objectives.append((total + model.config.heads.z_loss * squares) / valid)
    return torch.stack(losses), torch.stack(objectives)
