"""Continuations of a text by head 1, for models that fit one device."""

import torch

from mtp_dist.model.reference import ReferenceModel


@torch.no_grad()
def sample_continuation(
    model: ReferenceModel, prompt: list[int], tokens: int, temperature: float, seed: int
) -> list[int]:
    """Up to `tokens` new tokens after the prompt, drawn one by one from head 1's distribution at that temperature.

    The model sees the last `train.sequence_length` tokens; it was trained on no longer context.
    """
    context = model.config.train.sequence_length
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    for _ in range(tokens):
        logits = model.next_token_logits(torch.tensor([text[-context:]]))[0, -1]
        if not logits.isfinite().all():  # a run that diverged
            break
        probabilities = (logits / temperature).softmax(-1)
        text.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return text[len(prompt) :]
