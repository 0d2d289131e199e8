"""Generate several tokens per forward pass: this model's other heads draft them, head 1 verifies them.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=100)

Greedy text is that of plain generation; sampled text has the same distribution, but is another text at the same seed.
One text at a time is drafted; batches, beams and every other mode of `generate` run as without this file, and so do
texts that may exceed the length from which a `dynamic` rotary embedding is scaled.

The model is trunk and head 1; the other heads are in `mtp_heads.safetensors`. Each step runs the model once on the
newest token and the drafts, keeps the drafts that head 1 accepts and one token of its own, and lets the heads draft
again from the hidden states at the last accepted position.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils.hub import cached_file

PLAIN_SETTINGS = (
    "assistant_early_exit assistant_model constraints cache custom_generate dola_layers force_words_ids guidance_scale "
    "inputs_embeds negative_prompt_ids past_key_values penalty_alpha position_ids prompt_lookup_num_tokens "
    "return_dict_in_generate synced_gpus use_mtp watermarking_config"
).split()
"""Arguments of `generate` with which it runs without drafts."""


def generate(inputs: Tensor | None = None, generation_config: Any = None, *args: Any, model: Any, **kwargs: Any) -> Any:
    """Return what `model.generate` returns for the same arguments."""
    config = generation_config or model.generation_config
    settings = {name: kwargs[name] if name in kwargs else getattr(config, name, None) for name in PLAIN_SETTINGS}
    sequences = [kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    plain = functools.partial(type(model).generate, model, inputs)  # model.generate is this function
    if args or max(sequences) > 1 or any(value is not None and value is not False for value in settings.values()):
        return plain(generation_config, *args, **kwargs)
    # A callable gets neither the tokenizer nor the streamer: turn the strings into a criterion, and pass the streamer.
    strings, tokenizer = kwargs.pop("stop_strings", None), kwargs.pop("tokenizer", None)
    if strings:
        given = kwargs.get("stopping_criteria") or []
        kwargs["stopping_criteria"] = StoppingCriteriaList([*given, StopStringCriteria(tokenizer, strings)])
    return plain(
        generation_config, custom_generate=functools.partial(decode, streamer=kwargs.get("streamer")), **kwargs
    )


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor:
    """Continue one text, with everything that `generate` prepared."""
    cache: Any = model_kwargs.get("cache")
    has_one_text = len(input_ids) == 1 and model_kwargs.get("attention_mask") is None
    # Beyond it each token changes the rotary embedding of `dynamic` scaling, while cached keys stay as they are.
    limit = model.config.max_position_embeddings if model.config.rope_parameters["rope_type"] == "dynamic" else math.inf
    is_empty = isinstance(cache, DynamicCache) and not cache.get_seq_length()
    if not has_one_text or not is_empty or generation_config.max_length > limit:
        prepared = (logits_processor, stopping_criteria, generation_config)
        return type(model)._sample(model, input_ids, *prepared, streamer=streamer, **model_kwargs)

    def probabilities(text: Tensor, logits: Tensor) -> Tensor:
        """Return the distribution after temperature, top-k and so on; all of it on one token if the text is greedy."""
        scores = logits_processor(text, logits.to(text.device, torch.float32))[0]
        return scores.softmax(-1) if generation_config.do_sample else F.one_hot(scores.argmax(-1), len(scores)).float()

    place = (model.lm_head.weight.device, model.lm_head.weight.dtype)
    if place not in vars(model).setdefault("mtp_heads", {}):
        model.mtp_heads = {place: Heads(model)}  # read again if the model has been moved
    drafter, drafts = Drafter(model.mtp_heads[place]), list[tuple[Tensor, Tensor]]()
    cache.activate_past_recording()  # so that a window keeps what comes back when drafts are rejected
    while True:
        text = torch.cat([input_ids, *(token for token, _ in drafts)], 1)
        with outputs_of_layers(model, drafter.heads.collected) as outputs:
            new = text[:, cache.get_seq_length() :].to(model.device)
            logits = model(new, cache=cache, use_cache=True, logits_to_keep=len(drafts) + 1).logits
        for index in range(len(drafts) + 1):
            target = probabilities(input_ids, logits[:, index])
            token, is_accepted = verify(*drafts[index], target) if index < len(drafts) else (pick(target), False)
            input_ids = torch.cat([input_ids, token], 1)
            if streamer is not None:
                streamer.put(token[0].cpu())
            if stopping_criteria(input_ids, None).all():
                if streamer is not None:
                    streamer.end()
                return input_ids
            if not is_accepted:
                break
        length = input_ids.shape[1]
        rejected = text.shape[1] + 1 - length
        cache.crop(-rejected)
        states = drafter.heads.weigh(outputs)
        accepted = {layer: output[:, : new.shape[1] - rejected] for layer, output in states.items()}
        drafts = drafter.draft(input_ids, accepted, probabilities)[: generation_config.max_length - length - 1]


def pick(probabilities: Tensor) -> Tensor:
    """Return a token `[1, 1]` drawn from a distribution, which need not sum to 1."""
    return torch.multinomial(probabilities, 1)[None]


def verify(draft: Tensor, proposal: Tensor, target: Tensor) -> tuple[Tensor, bool]:
    """Return the next token, and whether it is the draft. It has the distribution `target` (Leviathan et al. 2023).

    draft: a token drawn from the distribution `proposal`.
    """
    index = int(draft)
    if torch.rand((), device=target.device) * proposal[index] < target[index]:
        return draft, True
    missing = (target - proposal).clamp(min=0)
    return pick(missing if missing.any() else target), False


LAYER = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.q_layernorm": ("self_attn.q_norm",),
    "self_attention.k_layernorm": ("self_attn.k_norm",),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
"""Modules of a layer of the model that each module of a layer of a head consists of."""
GPT_NEOX_LAYER = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.linear_qkv": ("attention.query_key_value",),
    "self_attention.linear_proj": ("attention.dense",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.linear_fc1": ("mlp.dense_h_to_4h",),
    "mlp.linear_fc2": ("mlp.dense_4h_to_h",),
}
"""The same for GPT-NeoX."""


class Heads:
    """Weights and settings of heads 2..n on the device of the model's unembedding."""

    def __init__(self, model: Any) -> None:
        self.model, self.like, self.trunk = model, model.lm_head.weight, model.base_model
        self.is_gpt_neox = hasattr(self.trunk, "final_layer_norm")
        revision = getattr(model.config, "_commit_hash", None)
        find = functools.partial(cached_file, model.config.name_or_path, revision=revision)
        with open(str(find("mtp_config.json")), encoding="utf-8") as file:
            config = json.load(file)["config"]
        path = find("mtp_heads.safetensors", _raise_exceptions_for_missing_entries=False)
        weights = load_file(path) if path else {}
        self.weights = {name: weight.to(self.like) for name, weight in weights.items()}
        heads, trunk_layers = config["heads"], config["model"]["trunk_layers"]
        self.kind, self.count, self.layers_per_head = heads["kind"], heads["count"], heads["layers_per_head"]
        self.eps = model.config.layer_norm_eps if self.is_gpt_neox else model.config.rms_norm_eps
        self.distances = [0, *(heads["prediction_distances"] or range(1, self.count + 1))]
        last = trunk_layers - 1 if self.kind == "parallel" else model.config.num_hidden_layers - 1
        between = self.layers_per_head if self.kind == "anticausal" else 0
        self.reads = {k: last - (k - 1) * between for k in range(2, self.count + 1)}
        """Layer of the model whose output head k reads, by k."""
        logits = self.weights.get("weighted_hidden_states.logits", torch.empty(0))
        self.state_weights: list[float] = logits.float().softmax(0).tolist()
        """Weights of the outputs of the embedding and of each trunk layer in the sum that heads read; empty without."""
        self.collected = range(-1, trunk_layers) if self.state_weights else self.reads.values()
        """Layers of the model whose outputs are read; -1 is the embedding."""
        self.own = {k: self._own(f"heads.{'repeated' if heads['repeated'] else k}.") for k in self.reads}
        """Weights of each head by their names in it."""
        depths = range(self.layers_per_head if self.kind in ("parallel", "causal", "sequential") else 0)
        self.layers = {k: [self._layer(k, depth) for depth in depths] for k in self.reads}

    def weigh(self, outputs: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return the states that the heads read by the layer in `reads`, from the outputs of the layers."""
        if not self.state_weights:
            return outputs
        total, last = torch.zeros(()), len(self.state_weights) - 2
        for weight, layer in zip(self.state_weights, range(-1, last + 1), strict=True):
            total = total.to(outputs[layer].device) + weight * outputs[layer].float()
        return {last: total.to(self.like)}

    def _own(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): weight for name, weight in self.weights.items() if name.startswith(prefix)}

    def _layer(self, head: int, depth: int) -> nn.Module:
        """Return a layer as the model's, with a place of its own in the drafter's cache."""
        config, prefix = self.model.config, "layers." * (self.kind == "sequential") + str(depth)
        with torch.device("meta"):
            layer: Any = type(self.trunk.layers[0])(config, 0)
        attention, parts_of = (layer.attention, GPT_NEOX_LAYER) if self.is_gpt_neox else (layer.self_attn, LAYER)
        attention.layer_idx = (head - 2) * self.layers_per_head + depth
        weights = dict[str, Tensor]()
        for (name, names), kind in itertools.product(parts_of.items(), ("weight", "bias")):
            weight = self.own[head].get(f"{prefix}.{name}.{kind}")
            if weight is None:
                continue
            parts = weight.chunk(len(names))
            if name == "self_attention.linear_qkv" and len(names) > 1:
                queries = config.num_attention_heads // config.num_key_value_heads
                groups = weight.unflatten(0, (config.num_key_value_heads, queries + 2, -1))
                parts = tuple(part.flatten(0, 2) for part in groups.split([queries, 1, 1], 1))
            weights |= {f"{own}.{kind}": part for own, part in zip(names, parts, strict=True)}
        layer.load_state_dict(weights, assign=True)
        module: nn.Module = layer.eval()
        return module

    def block_input(self, head: int, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return what the head's layers read. tokens: those before the head's targets."""
        if self.kind == "linear":
            return F.linear(hidden, self.own[head]["linear.weight"])
        if self.kind != "sequential":
            return hidden
        embedded = self.model.get_input_embeddings()(tokens.to(self.model.device)).to(hidden.device)
        weights, norms = self.own[head], {"enorm": embedded, "hnorm": hidden}
        parts = [self.norm(x, weights[f"{name}.weight"], weights.get(f"{name}.bias")) for name, x in norms.items()]
        return F.linear(torch.cat(parts, -1), weights["eh_proj.weight"])

    def norm(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the hidden state after a norm of the model's type: LayerNorm, which has a bias, or RMSNorm."""
        states, weight = hidden.float(), weight.to(hidden.device).float()
        if bias is None:
            return F.rms_norm(states, weight.shape, weight, self.eps).to(hidden.dtype)
        return F.layer_norm(states, weight.shape, weight, bias.to(hidden.device).float(), self.eps).to(hidden.dtype)

    def logits(self, head: int, hidden: Tensor, previous_token: Tensor) -> Tensor:
        """Return the logits of a head's output `[1, D]`, for the token after `previous_token` `[1]`."""
        final_norm = self.trunk.final_layer_norm if self.is_gpt_neox else self.trunk.norm
        hidden = self.norm(hidden, *final_norm.parameters(recurse=False))  # without a linear model's matrix of head 1
        if self.kind == "mlp":
            hidden = hidden + F.silu(F.linear(hidden, self.own[head]["linear.weight"]))
        if f"condition.{head}.weight" in self.weights:
            embedded = F.embedding(previous_token.to(hidden.device), self.weights["condition.embedding.weight"])
            hidden = hidden + F.linear(embedded, self.weights[f"condition.{head}.weight"])
        return F.linear(hidden, self.weights.get(f"unembeddings.{head}.weight", self.like))


class Drafter:
    """The heads on one text, with the keys and values of all positions before the newest token."""

    def __init__(self, heads: Heads) -> None:
        self.heads, self.cache = heads, DynamicCache()
        self.kept: dict[int, Tensor] = {}
        """Outputs of the model's layers at positions that a `sequential` head has only run with drafts."""
        self.recent: dict[int, Tensor] = {}
        """Outputs of each head at the last positions: those of which its drafts are still ahead."""

    def draft(self, text: Tensor, outputs: dict[int, Tensor], probabilities: Callable[[Tensor, Tensor], Tensor]) -> Any:
        """Return the next tokens after a text `[1, N]`, each with the distribution that it was drawn from.

        outputs: of the model's layers at the newest positions, up to N - 2; the newest token has none yet.
        """
        heads, model, drafts = self.heads, self.heads.model, list[tuple[Tensor, Tensor]]()
        outputs = {layer: torch.cat([self.kept.get(layer, x[:, :0]), x], 1) for layer, x in outputs.items()}
        end, hidden, unbroken = text.shape[1] - 1, torch.empty(0), True
        for k, layer in heads.reads.items():
            if k == 2 or heads.kind not in ("causal", "sequential"):  # which read the output of head k - 1
                hidden = outputs[layer].to(heads.like.device)
            positions = torch.arange(end - hidden.shape[1], end, device=hidden.device)[None]
            if k == 2:
                window = getattr(model.config, "sliding_window", None)
                create_mask = create_causal_mask if window is None else create_sliding_window_causal_mask
                mask = create_mask(model.config, hidden, None, self.cache, positions)
                angles = heads.trunk.rotary_emb(hidden, position_ids=positions)
            hidden = heads.block_input(k, hidden, text[:, end - hidden.shape[1] + k - 1 : end + k - 1])
            for block in heads.layers[k]:
                cached = {"layer_past" if heads.is_gpt_neox else "cache": self.cache}
                hidden = block(
                    hidden, attention_mask=mask, position_ids=positions, position_embeddings=angles, **cached
                )
            # Beyond the distance of head k - 1 the first tokens are ahead of earlier positions.
            before, distance = heads.distances[k - 1 : k + 1]
            recent = self.recent[k] = torch.cat([self.recent.get(k, hidden[:, :0]), hidden], 1)[:, before - distance :]
            for back in range(distance - before, 0, -1):
                if unbroken := unbroken and back <= recent.shape[1]:
                    distribution = probabilities(text, heads.logits(k, recent[:, -back], text[:, -1]))
                    drafts.append((pick(distribution), distribution))
                    text = torch.cat([text, drafts[-1][0]], 1)
        if heads.kind == "sequential" and heads.count > 2:
            unsure = min(heads.count - 2, self.cache.get_seq_length())
            self.cache.crop(-unsure)
            self.kept = {layer: output[:, -unsure:] for layer, output in outputs.items()}
        return drafts


@contextmanager
def outputs_of_layers(model: Any, numbers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of the model's layers with these numbers while it runs; -1 is the embedding."""
    outputs: dict[int, Tensor] = {}

    def collect(number: int, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs[number] = output

    layers, embedding = model.base_model.layers, model.get_input_embeddings()
    modules = {number: layers[number] if number >= 0 else embedding for number in numbers}
    hooks = [layer.register_forward_hook(functools.partial(collect, number)) for number, layer in modules.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
