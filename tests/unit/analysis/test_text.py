"""What the analyzed models read."""

import numpy as np
import torch

from mtp_dist.analysis.information import token_losses
from mtp_dist.analysis.marked_text import Mark
from mtp_dist.analysis.text import read_marked_text, read_tokens
from mtp_dist.analysis.trained_model import TrainedModel
from mtp_dist.data.synthetic.choices import Choices
from mtp_dist.data.synthetic.task import TaskCorpus
from tests.unit.convert.folders import write_model

CHOICES = "synthetic/choices"
END = 256
"""The end of a document, in bytes."""


def test_tasks_are_read_from_held_out_documents(tmp_path):
    """They have the parameters of the training, and marks by word."""
    source = {"path": CHOICES, "options": {"length": 4, "branches": 2, "seed": 3}}
    write_model(tmp_path / "c", vocab_size=273, data={"tokenizer": CHOICES, "train": [source]})
    model = TrainedModel.open(tmp_path / "c")
    corpus = TaskCorpus(Choices(branches=2, length=4), "validation", 3)
    first, second = (corpus.document(number).words for number in range(2))
    text = read_marked_text(CHOICES, model, 62)
    assert model.tokenizer.decode(text.tokens) == " ".join(first + second)
    phrase = [Mark.CHOICE, Mark.DETERMINED, Mark.INCONSEQUENTIAL, Mark.DETERMINED, Mark.DETERMINED]
    assert text.marks.tolist() == (phrase * 12 + [Mark.OTHER]) * 2
    np.testing.assert_array_equal(read_tokens(CHOICES, model, 62), text.tokens)


def test_documents_bound_losses_and_attention_as_in_the_training(tmp_path):
    bounds = {"attention_across_documents": False, "loss_across_documents": False}
    reference = write_model(tmp_path / "c", data={"train": [{"path": "python-stdlib"}]} | bounds)
    model = TrainedModel.open(tmp_path / "c")
    tokens = np.random.default_rng(8).integers(0, 256, 36)
    tokens[[7, 20]] = END
    losses = token_losses(model, model.windows(tokens, 32), lambda done, total: None)
    crossing = [[any(tokens[s : s + k] == END) for s in range(32)] for k in range(1, 5)]
    np.testing.assert_array_equal(np.isnan(losses), crossing)
    alone = torch.as_tensor(tokens[None, 21:36])  # the third document, from within the second window on
    with torch.no_grad():
        logits = reference(alone, 11)
    for k in range(1, 5):
        expected = torch.nn.functional.cross_entropy(logits[k][0], alone[0, k : k + 11], reduction="none")
        np.testing.assert_allclose(losses[k - 1, 21:32], expected, rtol=1e-4)
