"""Continuations of a text by head 1, for models that fit one device."""

import torch

from mtp_dist.model.reference import ReferenceModel
from mtp_dist.model.targets import document_ids


@torch.no_grad()
def sample_continuation(
    model: ReferenceModel, prompt: list[int], tokens: int, temperature: float, seed: int, end_of_document: int
) -> list[int]:
    """Up to `tokens` new tokens after the prompt, drawn one by one from head 1's distribution at that temperature.

    The model sees what it saw in training: the last `train.sequence_length` tokens, and where its attention stopped at
    documents, of these the last document.
    """
    context = model.config.train.sequence_length
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    for _ in range(tokens):
        seen = torch.tensor([text[-context:]])
        if not model.config.data.attention_across_documents:
            documents = document_ids(seen, end_of_document)
            seen = seen[documents == documents[0, -1]][None]
        logits = model.next_token_logits(seen)[0, -1]
        if not logits.isfinite().all():  # a run that diverged
            break
        probabilities = (logits / temperature).softmax(-1)
        text.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return text[len(prompt) :]
