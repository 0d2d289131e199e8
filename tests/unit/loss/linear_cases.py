"""Inputs of the linear cross-entropy, with targets, soft targets or both, over the real vocabulary."""

from dataclasses import replace

import torch

from mtp_dist.loss.objective import SoftTargets
from mtp_dist.model.targets import IGNORE_INDEX
from tests.unit.loss.harness import TOKENS, VOCAB_SIZE, WIDTH, LinearCase


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
    same = replace(case, hidden=case.hidden[:1].repeat(TOKENS, 1), targets=case.targets * 0 + 65)
    return {
        "random": case,
        "z-loss": replace(case, z_loss=1e-2),
        "masked": masked,
        "masked, z-loss": replace(masked, z_loss=1e-2),
        "one valid target": replace(case, targets=only.index_fill(0, torch.tensor([11]), 66)),
        "one valid target of z-loss": replace(case, targets=only.index_fill(0, torch.tensor([0]), 3), z_loss=1e-2),
        "no valid target": replace(case, targets=only, z_loss=1e-2),
        "every position the same": same,
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


def soft_cases() -> dict[str, LinearCase]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.stack([torch.randperm(VOCAB_SIZE, generator=generator)[:5] for _ in range(TOKENS)])
    shares = torch.randn(TOKENS, 5, generator=generator).softmax(1)
    generator = torch.Generator().manual_seed(8)
    targets = torch.randint(0, VOCAB_SIZE, (TOKENS,), generator=generator)
    uneven = targets.masked_fill(torch.rand(TOKENS, generator=generator) < 0.4, IGNORE_INDEX)
    some = shares * (torch.rand(TOKENS, 1, generator=generator) < 0.6)
    only = torch.full((TOKENS,), IGNORE_INDEX)
    case = replace(random_case(7), targets=only, soft=SoftTargets(ids, shares), soft_weight=1.0)
    both = replace(case, targets=targets, soft_weight=0.25)
    mixed = replace(both, targets=uneven, soft=SoftTargets(ids, some), z_loss=1e-2)
    # The last two are padding on a rank that has nothing else, or beyond all.
    padding = torch.cat([ids[:, :3], torch.tensor([[191, 200]]).expand(TOKENS, 2)], 1)
    pair, pair_shares = torch.tensor([[7, 70]] * 6), torch.tensor([[0.75, 0.25]] * 6)
    steep = replace(steep_case(), soft=SoftTargets(pair, pair_shares), soft_weight=0.5)
    close = SoftTargets(pair, pair_shares * torch.eye(6)[4, :, None])
    return {
        "soft alone": case,
        "soft with targets": both,
        "soft with targets, z-loss": replace(both, z_loss=1e-2),
        "some positions of either": mixed,
        "no positions": replace(case, soft=SoftTargets(ids, shares * 0), z_loss=1e-2),
        "one position": replace(case, soft=SoftTargets(ids, shares * torch.eye(TOKENS)[11, :, None])),
        "any mass": replace(both, soft=SoftTargets(ids, shares * torch.rand(TOKENS, 1, generator=generator) * 3)),
        "weight 0": replace(both, soft_weight=0.0),
        "tokens twice": replace(mixed, soft=SoftTargets(ids[:, [0, 1, 0, 1, 1]], some)),
        "the target among them": replace(both, soft=SoftTargets(torch.cat([targets[:, None], ids[:, 1:]], 1), shares)),
        "one rank has all": replace(both, soft=SoftTargets(ids % 60, shares)),
        "the last 3 tokens": replace(both, soft=SoftTargets(128 + ids % 3, shares)),
        "into padding": replace(mixed, soft=SoftTargets(padding, some * torch.tensor([1, 1, 1, 0, 0]))),
        "soft, steep": replace(steep, targets=only[:6]),
        "soft, steep, small losses": replace(steep, targets=only[:6], soft=close),
        "soft, steep, with targets": replace(steep, z_loss=1e-2),
        "soft, one position per chunk": replace(mixed, chunk_tokens=1),
        "soft, chunks of 3": replace(mixed, chunk_tokens=3),
        "soft, chunk larger than all": replace(mixed, chunk_tokens=1000),
        "soft, frozen": replace(mixed, frozen=True),
        "soft, added": replace(mixed, start=0.125, chunk_tokens=3, scale=7.0),
    }


def total_variation_cases() -> dict[str, LinearCase]:
    soft = soft_cases()

    def varied(case: LinearCase, soft_weight: float = 0.0) -> LinearCase:
        assert case.soft
        distance = case.soft._replace(total_variation=True)
        return replace(case, soft=distance, soft_weight=soft_weight, total_variation_weight=2.0)

    names = {
        "total variation alone": "soft alone",
        "total variation with targets": "some positions of either",
        "total variation into padding": "into padding",
        "total variation, the target among them": "the target among them",
        "total variation, steep": "soft, steep, with targets",
        "total variation, chunks of 3": "soft, chunks of 3",
        "total variation, added": "soft, added",
    }
    cases = {name: varied(soft[other]) for name, other in names.items()}
    alone = cases["total variation alone"]
    assert alone.soft
    certain = alone.soft._replace(probabilities=torch.eye(5)[0].expand(TOKENS, 5))
    first = alone.soft._replace(token_ids=alone.soft.token_ids.argsort(1) * 11)
    return cases | {
        "total variation and soft": varied(soft["some positions of either"], 0.25),
        "total variation to one token": replace(alone, soft=certain),
        "total variation, one rank has all": replace(alone, soft=first),
    }


FP32 = target_cases() | soft_cases() | total_variation_cases()
LOW = ["random", "masked, z-loss", "chunks of 3", "confident", "soft alone", "some positions of either"]
LOW += ["soft, chunks of 3", "tokens twice", "total variation with targets", "total variation and soft"]
CASES = (
    FP32
    | {f"{name} in bf16": FP32[name].to(torch.bfloat16) for name in LOW}
    | {f"{name} in fp64": FP32[name].to(torch.float64) for name in [*LOW, "steep", "soft, steep"]}
)
