"""Memory of the cache with and without drafts."""

from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from mtp_dist.bench.decode.settings import Settings
from mtp_dist.bench.decode.subject import Subject
from mtp_dist.inference.decoding import Decoder
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.sampling import Sampler
from mtp_dist.inference.speculation import Speculation
from mtp_dist.inference.text import StoppingRules, TextBatch


def cache_memory(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Return the bytes of the cache at the end of one text, and the fraction of them and of the layers that is the
    draft heads'.
    """
    model = subject.model
    prompts = subject.prompts(1).to(settings.device)
    plain, drafting = (
        _cache_bytes(model, prompts, settings.positions, heads) for heads in (1, model.config.heads.count)
    )
    return {
        "plain_bytes": plain,
        "drafting_bytes": drafting,
        "added_share": (drafting - plain) / drafting,
        "layer_share": model.num_draft_layers / model.num_cache_layers,
    }


def _cache_bytes(model: MTPForCausalLM, prompts: Tensor, positions: int, heads: int) -> int:
    text = TextBatch(prompts, None, StoppingRules(frozenset(), positions, StoppingCriteriaList()))
    decoder = Decoder(model, text, Sampler(LogitsProcessorList(), False), Speculation(heads), static_cache=False)
    decoder.read_prompts(prompts.shape[1])
    while text.rows:
        decoder.step()
    return decoder.cache.nbytes()
