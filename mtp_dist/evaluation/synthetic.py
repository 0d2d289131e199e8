"""Accuracies of a trained model on held-out documents of a synthetic task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.config.loader import synthetic_options
from mtp_dist.config.synthetic import SYNTHETIC_PREFIX
from mtp_dist.data.synthetic.task import Document, HeldOutSplit, Task, TaskCorpus
from mtp_dist.data.synthetic.tasks import build_task, task_kind
from mtp_dist.errors import ConfigError, UserError
from mtp_dist.inference.generator import Generator
from mtp_dist.inference.request import describe_text_limit

BATCH_SIZE = 64
DEFAULT_DOCUMENTS = 2000


@dataclass
class Score:
    """Counts of the answers of one group."""

    correct: int = 0
    total: int = 0
    guessed: float = 0.0
    """Expected number of right answers of a guess."""

    def as_json(self) -> dict[str, float]:
        return {
            "correct": self.correct,
            "total": self.total,
            "accuracy": self.correct / self.total,
            "chance": self.guessed / self.total,
        }


def evaluate_synthetic(
    folder: Path,
    task: str,
    options: Mapping[str, Any] | None = None,
    split: HeldOutSplit = "validation",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Return as JSON the accuracy of head 1 on each group of answers, with counts.

    folder: an export, a checkpoint or a run. task: such as `induction`. options: keys of `SyntheticConfig`; parameters
    of the task are by default those that the model was trained with. An answer is right if each of its words is
    the most probable one after those before it: greedy decoding would generate it. Raise UserError if the folder has no
    model, or one with another tokenizer or shorter texts.
    """
    kind = task_kind(task, f"--task = '{task}'")
    generator = Generator.open_on_device(folder)
    _check_tokenizer(generator, kind, folder)
    parameters = synthetic_options(
        {"documents": DEFAULT_DOCUMENTS} | _trained_parameters(generator.config, kind) | dict(options or {})
    )
    corpus = TaskCorpus(build_task(kind, parameters, ""), split, parameters.seed)
    scores: dict[str, Score] = {}
    for first in range(0, parameters.documents, BATCH_SIZE):
        numbers = range(first, min(first + BATCH_SIZE, parameters.documents))
        score_documents(generator, [corpus.document(number) for number in numbers], scores)
        on_progress(numbers.stop, parameters.documents)
    return {
        "model": str(folder),
        "task": kind.name,
        "split": split,
        "documents": parameters.documents,
        "seed": parameters.seed,
        "options": asdict(corpus.task),
        "groups": {group: scores[group].as_json() for group in sorted(scores)},
    }


def _check_tokenizer(generator: Generator, kind: type[Task], folder: Path) -> None:
    """Raise ConfigError unless the model's tokens are the words of the task."""
    try:
        fits = generator.tokenizer.encode(" ".join(kind.words)).tolist() == list(range(len(kind.words)))
    except UserError:
        fits = False
    if not fits:
        raise ConfigError(
            f"--model = '{folder}' was not trained with data.tokenizer = '{SYNTHETIC_PREFIX}{kind.name}': evaluate the "
            "task that it was trained on"
        )


def _trained_parameters(config: Config, kind: type[Task]) -> dict[str, Any]:
    """Return the parameters of the task in the training that a configuration describes."""
    for source in config.data.train:
        if source.path == SYNTHETIC_PREFIX + kind.name and source.options:
            return source.options.model_dump(exclude_none=True, exclude={"documents", "seed"})
    return {}


@torch.inference_mode()
def score_documents(generator: Generator, documents: Sequence[Document], scores: dict[str, Score]) -> None:
    """Add the answers in a batch of documents to the scores. Raise ConfigError if the model's texts are shorter."""
    # As in training, a document follows the end of another one, unless attention stops there.
    prefix = [generator.tokenizer.end_of_document] * generator.config.data.attention_across_documents
    rows = [prefix + generator.tokenizer.encode(document.text).tolist() for document in documents]
    width = max(map(len, rows))
    if width > generator.positions:
        raise ConfigError(
            f"a document has {width} tokens, but {describe_text_limit(generator.config)}: choose smaller parameters, "
            "or a model for longer texts"
        )
    end = generator.tokenizer.end_of_document
    ids = torch.tensor([row + [end] * (width - len(row)) for row in rows], device=generator.model.device)
    correct = (generator.model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).cpu()
    for document, correct_next in zip(documents, correct, strict=True):
        for group, is_right, chance in _scored_answers(document, correct_next, len(prefix)):
            score = scores.setdefault(group, Score())
            score.correct += is_right
            score.total += 1
            score.guessed += chance


def _scored_answers(document: Document, correct_next: Tensor, prefix: int) -> Iterator[tuple[str, bool, float]]:
    """Yield each answer's group, whether it is right, and its chance.

    correct_next: whether the most probable token after each position is right. prefix: number of tokens before the
    first word. The first token of all has nothing to follow from and is left out.
    """
    for answer in document.answers:
        if start := answer.start + prefix:
            yield answer.group, bool(correct_next[start - 1 : answer.end + prefix - 1].all()), answer.chance
