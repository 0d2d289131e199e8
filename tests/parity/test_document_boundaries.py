"""Where documents stop attention, no loss depends on the document before; the random batches have such documents."""

import pytest
import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.loss.schedule import head_schedule
from mtp_dist.model.targets import IGNORE_INDEX, document_ids
from mtp_dist.verify.reference_training import END_OF_DOCUMENT, local_batch, random_batch
from tests.engines import global_batch, open_engine
from tests.parity.comparison import parse_case
from tests.ranks import Ranks
from tests.tiny import VOCAB_SIZE

END_OF_FIRST = 7
"""Position at which the first of two documents ends."""


def test_batches_have_documents_and_masks_that_differ() -> None:
    _, config = parse_case("tp1-pp1-dp2 data.loss_across_documents=false data.attention_across_documents=false")
    samples, targets = global_batch(config, 1)
    documents = document_ids(samples, END_OF_DOCUMENT)[:, -1] + 1
    assert documents[0] >= 4 and documents[-1] == 1
    halves = [(half != IGNORE_INDEX).sum((1, 2)) for half in targets.chunk(2, 1)]
    assert (halves[0] != halves[1]).all(), "data-parallel ranks have unequal numbers of targets"
    assert len(set(halves[0].tolist())) == len(targets), "and so have the heads"


def second_document_losses(config: Config) -> tuple[Tensor, Tensor]:
    """On each rank: return the heads' mean losses `[n]` in second documents, before and after a change to the first."""
    engine = open_engine(config)
    samples, targets = random_batch(config)
    samples[:, END_OF_FIRST] = END_OF_DOCUMENT
    targets[:, :, : END_OF_FIRST + 1] = IGNORE_INDEX
    changed = samples.clone()
    changed[:, :END_OF_FIRST] = samples[:, :END_OF_FIRST] % (VOCAB_SIZE - 1) + 1
    batches = [local_batch(config, engine.topology, tokens, targets) for tokens in (samples, changed)]
    before, after = (engine.evaluate(batch, head_schedule(config, 1)).losses for batch in batches)
    return torch.tensor(before), torch.tensor(after)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("kind", ["parallel", "sequential"])
@pytest.mark.parametrize("name", ["tp1-pp3-dp1", "tp2-pp2-dp1-sp", "tp1-pp2-dp1-v"])
def test_losses_do_not_depend_on_the_document_before(ranks: Ranks, name: str, kind: str, across: bool) -> None:
    layout, config = parse_case(f"{name} heads.kind={kind} data.attention_across_documents={str(across).lower()}")
    for before, after in ranks.run(layout.world_size, second_document_losses, config):
        assert (before > 0).all()
        assert (before != after).all() if across else torch.equal(before, after)
