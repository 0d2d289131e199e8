"""Samples of text from head 1, for models that fit on one device."""

import torch

from mtp_dist.model.reference import ReferenceModel
from mtp_dist.model.targets import document_ids


@torch.no_grad()
def sample_continuation(
    model: ReferenceModel, prompt: list[int], tokens: int, temperature: float, seed: int, end_of_document: int
) -> list[int]:
    """Return up to `tokens` new tokens after the prompt, drawn one by one from head 1 at that temperature.

    The context is as in training: the last `train.sequence_length` tokens, and only their last document if attention
    stops at documents' ends.
    """
    length = model.config.train.sequence_length
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    for _ in range(tokens):
        context = torch.tensor([text[-length:]])
        if not model.config.data.attention_across_documents:
            documents = document_ids(context, end_of_document)
            context = context[documents == documents[0, -1]][None]
        logits = model.next_token_logits(context)[0, -1]
        if not logits.isfinite().all():  # a run that diverged
            break
        probabilities = (logits / temperature).softmax(-1)
        text.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return text[len(prompt) :]
