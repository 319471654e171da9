"""Cuts of a leaf: parts of a copy hold every element once, and the ranks that hold a box are found without a search."""

import itertools
import random

import pytest
import torch

from mmfn import tree
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.weights.sharding import local, shard_params, whole
from mmfn.parallel.weights.slices import Cut, cut_of
from tests import tiny


def random_cut(draw: random.Random, num_dims: int) -> Cut:
    sizes = tuple(draw.choice((1, 2, 3, 4)) for _ in range(draw.randint(1, 3)))
    return Cut(sizes, tuple(draw.choice((None, *range(num_dims))) for _ in sizes))


@pytest.mark.parametrize("seed", range(40))
def test_holders_are_those_whose_part_meets_the_box(seed: int) -> None:
    draw = random.Random(seed)
    shape = tuple(draw.choice((1, 3, 5, 8)) for _ in range(draw.randint(0, 3)))
    cut = random_cut(draw, len(shape))
    for copy in range(cut.num_copies):
        counts = torch.zeros(shape, dtype=torch.int64)
        ranks = [rank for rank in range(cut.num_ranks) if cut.copy_of(rank) == copy]
        for rank in ranks:
            counts[tuple(slice(*pair) for pair in cut.ranges(shape, rank))] += 1
        assert (counts == 1).all()
        box = tuple(sorted(draw.sample(range(size + 1), 2)) for size in shape)
        box = tuple((start, stop) for start, stop in box)
        meets = {
            rank: cut.ranges(shape, rank)
            for rank in ranks
            if all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(cut.ranges(shape, rank), box, strict=True))
        }
        assert dict(cut.holders(shape, box, copy)) == meets


def test_few_ranks_are_looked_at() -> None:
    """Of 65,536 ranks the ten that hold a box are found, not looked for."""
    cut = Cut((4, 1 << 14), (None, 0))
    box = ((640, 650), (0, 2))
    found = list(itertools.islice(cut.holders((1 << 14, 2), box, 3), 100))
    assert [rank for rank, _ in found] == [3 * (1 << 14) + 640 + i for i in range(10)]


@pytest.mark.parametrize("layout", [Layout(dp=4, ep=2), Layout(replicate=2, dp=2), Layout(dp=3)])
def test_a_cut_says_what_a_rank_holds(layout: Layout) -> None:
    model = tiny.model_of("moe")
    specs = model.family.specs(model.cfg)

    def check(mesh: Mesh) -> None:
        for leaf in tree.leaves(shard_params(model.params, specs, mesh)):
            cut = cut_of(leaf, mesh["world"])
            part = whole(leaf, mesh)[tuple(slice(*p) for p in cut.ranges(leaf.shape, mesh["world"].index))]
            assert torch.equal(part, local(leaf))
            assert cut.num_ranks == layout.world

    virtual(layout, check)
