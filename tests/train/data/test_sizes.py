"""What samples cost, against FLOPs counted in the models' own forward passes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmfn.batch import Sample
from mmfn.ops import portable
from mmfn.train.data.sizes import Buckets, Rates, flop_rates
from tests import tiny

ATTENTION = ("dense", "moe", "windows", "glm", "omni")  # the others carry a state from token to token as well


def rates_of(model: Any) -> Rates:
    family, cfg = model.family, model.cfg
    return flop_rates(family.specs(cfg), family.towers(cfg), family.experts_per_token(cfg))


def counted(model: Any, sample: Sample) -> int:
    batch = model.family.pack([sample], model.cfg)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.family.apply(model.params, batch, model.cfg, portable())
    return counter.get_total_flops()


def measured(model: Any, sample: Sample) -> tuple[int, ...]:
    towers = model.family.towers(model.cfg)
    buckets = Buckets.of([10**6], {name: [kind.inputs * 10**5] for name, kind in towers.items()}, towers)
    return buckets.measure(sample, rates_of(model)).costs


@pytest.mark.parametrize("name", ATTENTION)
def test_the_decoder_costs_what_its_operators_count(name: str) -> None:
    """Differences between lengths, so that what does not grow with them does not matter; routers are not counted."""
    model = tiny.model_of(name)
    samples = [model.family.example(n, 0, model.cfg) for n in (40, 90, 200)]
    flops = [counted(model, sample) for sample in samples]
    costs = [measured(model, sample)[0] for sample in samples]
    for i in (1, 2):
        assert costs[i] - costs[0] == pytest.approx(flops[i] - flops[0], rel=1e-3 if tiny.has_experts(name) else 1e-12)


@pytest.mark.parametrize("name", ["dense", "glm", "omni", "delta"])
def test_the_tower_costs_what_its_operators_count(name: str) -> None:
    """The larger the image, the less what surrounds the blocks counts: the patches' embedding and their merging."""
    model = tiny.model_of(name)
    samples = [model.family.example(400, side, model.cfg) for side in (0, 8, 16, 32)]
    flops = [counted(model, sample) for sample in samples]
    costs = [measured(model, sample)[1] for sample in samples]
    assert costs[0] == 0
    ratios = [(flop - flops[0]) / cost for flop, cost in zip(flops[1:], costs[1:], strict=True)]
    assert ratios == sorted(ratios, reverse=True)
    assert 1 < ratios[-1] < 1.05


def test_tokens_are_rounded_and_towers_counted_in_units() -> None:
    model = tiny.model_of("dense")
    towers = model.family.towers(model.cfg)
    buckets = Buckets.of([64, 512], {"vision": [1024]}, towers, segment_multiple=8, max_tokens=300)
    sample = model.family.example(201, 16, model.cfg)
    assert buckets.sizes(sample) == (208, 64)
    assert buckets.largest == (512, 256)
    assert buckets.excess(sample) is None
    long = model.family.example(301, 16, model.cfg)
    assert buckets.excess(long).startswith("has 301 tokens but max_tokens is 300; raise max_tokens")
    wide = model.family.example(299, 34, model.cfg)
    assert buckets.excess(wide) == (
        "has 1156 inputs of vision but the largest bucket holds 1024; add a larger bucket for inputs of vision or "
        "remove the sample"
    )


def test_steps_in_time_attend_to_themselves() -> None:
    """Two frames cost twice one; one of twice the patches costs more."""
    model = tiny.model_of("dense")
    one = model.family.example(200, 16, model.cfg)
    image = one.images[0]
    doubled = image.inputs_UF.repeat(2, 1)
    two = replace(one, images=(replace(image, inputs_UF=doubled, grid=(2, 16, 16)),))
    wide = replace(one, images=(replace(image, inputs_UF=doubled, grid=(1, 16, 32)),))
    costs = [measured(model, sample)[1] for sample in (one, two, wide)]
    assert costs[1] == 2 * costs[0] < costs[2]
