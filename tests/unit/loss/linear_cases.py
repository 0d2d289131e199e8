"""Inputs of the linear cross-entropy, with targets, soft targets or both, over the real vocabulary."""

from dataclasses import replace

import torch
from torch import Tensor

from mtp_dist.model.targets import IGNORE_INDEX
from tests.unit.loss.harness import TOKENS, VOCAB_SIZE, WIDTH, LinearCase

SOFT_TOKENS = 5


def random_case(seed: int = 4) -> LinearCase:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(VOCAB_SIZE, WIDTH, generator=generator) * 0.7
    return LinearCase(hidden, weight, torch.randint(0, VOCAB_SIZE, (TOKENS,), generator=generator))


def steep_case() -> LinearCase:
    """Logits 10^4, -10^4 and 0, exact in fp32: the target is certain, impossible or one of many equal ones."""
    hidden, weight = torch.zeros(6, WIDTH), torch.zeros(VOCAB_SIZE, WIDTH)
    hidden[0, 0], hidden[1, 0], hidden[2, 1], hidden[3, 2], hidden[4, 3] = 100, -100, 100, 100, 1
    weight[7, 0], weight[70, 0], weight[:, 1] = 100, -100, 100
    weight[:, 2], weight[130, 2], weight[7, 3], weight[70, 3] = -100, 100, 10000, 9999
    return LinearCase(hidden, weight, torch.tensor([7, 7, 70, 130, 70, 0]))


def confident_case() -> LinearCase:
    """Targets of probability about 0.999, over all ranks: bf16 has nothing between 0.996 and 1."""
    weight, targets = random_case().weight * 0.3, torch.arange(WIDTH) * 8 + 3
    weight[targets, torch.arange(WIDTH)] = 12.0
    return LinearCase(torch.eye(WIDTH).repeat(2, 1)[:TOKENS], weight, targets.repeat(2)[:TOKENS])


def tied_case() -> LinearCase:
    """Logits 0, 1 and 2 at several tokens and ranks each: targets that share the first place, or have it alone."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randint(0, 3, (VOCAB_SIZE, WIDTH), generator=generator).float()
    targets, alone = weight.argmax(0), torch.tensor([0, 5, 12])
    targets[alone] = torch.tensor([0, 66, 130])
    weight[targets[alone], alone] = 3.0
    return LinearCase(torch.eye(WIDTH), weight, targets)


def almost_tied_case() -> LinearCase:
    """Logits that differ, whose exponentials are all 1."""
    weight = torch.zeros(VOCAB_SIZE, WIDTH)
    weight[70], weight[3] = 1e-9, 5e-10
    return LinearCase(torch.eye(WIDTH), weight, torch.full((WIDTH,), 70))


def target_cases() -> dict[str, LinearCase]:
    case, steep = random_case(), steep_case()
    uneven = torch.rand(TOKENS, generator=torch.Generator().manual_seed(6)) < torch.linspace(0, 1, TOKENS)
    only, close = torch.full((TOKENS,), IGNORE_INDEX), torch.tensor([2, 4])
    masked = replace(case, targets=case.targets.masked_fill(uneven, IGNORE_INDEX))
    cases = {
        "random": case,
        "z-loss": replace(case, z_loss=1e-2),
        "masked": masked,
        "masked, z-loss": replace(masked, z_loss=1e-2),
        "one valid target": replace(case, targets=only.index_fill(0, torch.tensor([11]), 66)),
        "one valid target of z-loss": replace(case, targets=only.index_fill(0, torch.tensor([0]), 3), z_loss=1e-2),
        "no valid target": replace(case, targets=only, z_loss=1e-2),
        "every position the same": replace(
            case, hidden=case.hidden[:1].repeat(TOKENS, 1), targets=case.targets * 0 + 65
        ),
        "steep": steep,
        # Losses near 1 out of logits of 10^4, with no larger loss to hide the digits that a careless sum loses.
        "steep, small losses": replace(steep, targets=only[:6].index_copy(0, close, torch.tensor([70, 70]))),
        "steep, z-loss": replace(steep, z_loss=1e-2),
        "the last real token": replace(case, targets=case.targets * 0 + VOCAB_SIZE - 1),
        "one position per chunk": replace(masked, chunk_tokens=1, z_loss=1e-2),
        "chunks of 3": replace(masked, chunk_tokens=3, z_loss=1e-2),
        "chunk larger than all": replace(masked, chunk_tokens=1000, z_loss=1e-2),
        "frozen": replace(masked, frozen=True),
        "added": replace(masked, start=0.125, chunk_tokens=3),
        "large scale": replace(masked, scale=7.0, z_loss=1e-2),
        "ties": tied_case(),
        "almost ties": almost_tied_case(),
        "confident": confident_case(),
    }
    low = ("random", "masked, z-loss", "chunks of 3", "confident")
    cases |= {f"{name} in bf16": cases[name].to(torch.bfloat16) for name in low}
    return cases | {f"{name} in fp64": cases[name].to(torch.float64) for name in (*low, "steep")}


def soft_case() -> LinearCase:
    """Soft targets and no others."""
    generator = torch.Generator().manual_seed(7)
    token_ids = torch.stack([torch.randperm(VOCAB_SIZE, generator=generator)[:SOFT_TOKENS] for _ in range(TOKENS)])
    probabilities = torch.randn(TOKENS, SOFT_TOKENS, generator=generator).softmax(1)
    none = torch.full((TOKENS,), IGNORE_INDEX)
    return replace(random_case(7), targets=none, soft=(token_ids, probabilities), soft_weight=1.0)


def with_mass(case: LinearCase, mass: Tensor) -> LinearCase:
    assert case.soft
    return replace(case, soft=(case.soft[0], case.soft[1] * mass.unsqueeze(1)))


def with_token_ids(case: LinearCase, token_ids: Tensor) -> LinearCase:
    assert case.soft
    return replace(case, soft=(token_ids, case.soft[1]))


def into_padding(case: LinearCase) -> LinearCase:
    """The last two soft tokens have probability 0 and are padding on a rank that has nothing else, or beyond all."""
    assert case.soft
    token_ids, probabilities = (tensor.clone() for tensor in case.soft)
    token_ids[:, -2], token_ids[:, -1] = 191, 200
    probabilities[:, -2:] = 0.0
    return replace(case, soft=(token_ids, probabilities))


def soft_cases() -> dict[str, LinearCase]:
    generator = torch.Generator().manual_seed(8)
    case = soft_case()
    assert case.soft
    token_ids = case.soft[0]
    only_soft = torch.full((6,), IGNORE_INDEX)
    steep_soft = (torch.tensor([[7, 70]] * 6), torch.tensor([[0.75, 0.25]] * 6))
    steep = replace(steep_case(), targets=only_soft, soft=steep_soft, soft_weight=0.5)
    targets = torch.randint(0, VOCAB_SIZE, (TOKENS,), generator=generator)
    uneven = targets.masked_fill(torch.rand(TOKENS, generator=generator) < 0.4, IGNORE_INDEX)
    both = replace(case, targets=targets, soft_weight=0.25)
    some = (torch.rand(TOKENS, generator=generator) < 0.6).float()
    mixed = replace(with_mass(both, some), targets=uneven, z_loss=1e-2)
    cases = {
        "soft alone": case,
        "with targets": both,
        "with targets, z-loss": replace(both, z_loss=1e-2),
        "some positions of either": mixed,
        "no positions": with_mass(replace(case, z_loss=1e-2), some * 0),
        "one position": with_mass(case, torch.eye(TOKENS)[11]),
        "any mass": with_mass(both, torch.rand(TOKENS, generator=generator) * 3),
        "weight 0": replace(both, soft_weight=0.0),
        "tokens twice": with_token_ids(mixed, token_ids[:, [0, 1, 0, 1, 1]]),
        "the target among them": with_token_ids(both, torch.cat([targets[:, None], token_ids[:, 1:]], 1)),
        "one rank has all": with_token_ids(both, token_ids % 60),
        "the last 3 tokens": with_token_ids(both, 128 + token_ids % 3),
        "into padding": into_padding(mixed),
        "steep": steep,
        "steep, small losses": with_mass(steep, torch.tensor([0, 0, 0, 0, 1.0, 0])),
        "steep, with targets": replace(steep, targets=steep_case().targets, z_loss=1e-2),
        "one position per chunk": replace(mixed, chunk_tokens=1),
        "chunks of 3": replace(mixed, chunk_tokens=3),
        "chunk larger than all": replace(mixed, chunk_tokens=1000),
        "frozen": replace(mixed, frozen=True),
        "added": replace(mixed, start=0.125, chunk_tokens=3, scale=7.0),
    }
    low = ("soft alone", "some positions of either", "chunks of 3", "tokens twice")
    cases |= {f"{name} in bf16": cases[name].to(torch.bfloat16) for name in low}
    return cases | {f"{name} in fp64": cases[name].to(torch.float64) for name in (*low, "steep")}
