"""Frames spread over ranks: balance, static sizes, and that features come back to their tokens."""

import itertools
import random

import pytest
import torch

from mmfn.batch import AUDIO, Batch, Segments, Tower, TowerKind
from mmfn.parallel.context.tower_split import (
    assign_items,
    item_cost,
    split_tower,
    split_towers,
    spread_features,
    static_units,
)
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.mesh.virtual import run_virtual
from tests.parallel.conformance import BATCHES, Cell, batch_of
from tests.tiny import model_of

MATMUL = 56


def test_cost_is_that_of_matmuls_and_attention() -> None:
    """FLOPs of one block, counted: 4 projections and 2 products of the feed-forward layer, scores and values."""
    D, F = 8, 12
    for p in (4, 16, 100):
        flops = p * (4 * 2 * D * D + 2 * 2 * D * F) + 2 * 2 * p * p * D
        assert flops == 4 * D * item_cost(p, 2 * D + F)


def test_the_dearest_frame_goes_first_and_the_largest_load_is_near_the_best() -> None:
    r = random.Random(0)
    for _ in range(20):
        lengths, num_ranks = [4 * r.randint(0, 30) for _ in range(r.randint(1, 7))], r.randint(2, 3)
        costs = [item_cost(n, MATMUL) for n in lengths]

        def largest(ranks: tuple[int, ...] | list[int], costs: list[int] = costs, num_ranks: int = num_ranks) -> int:
            return max(sum(c for c, rank in zip(costs, ranks, strict=True) if rank == i) for i in range(num_ranks))

        best = min(map(largest, itertools.product(range(num_ranks), repeat=len(lengths))))
        assert largest(assign_items(lengths, num_ranks, MATMUL)) <= best * (4 / 3)
    assert assign_items([4, 16, 4, 8], 2, MATMUL) == [1, 0, 1, 1]
    assert assign_items([4, 4, 4], 2, MATMUL) == [0, 1, 0]  # ties: the earlier frame, the lower rank


def test_few_static_sizes_that_hold_what_is_needed() -> None:
    for num_units in (0, 1, 9, 256):
        for num_ranks in (2, 4, 8, 16):
            sizes = {most: static_units(most, num_units, num_ranks) for most in range(num_units + 1)}
            even = max(1, -(-num_units // num_ranks))
            assert all(size >= max(1, most) for most, size in sizes.items())
            assert all(size <= 1.5 * max(most, even) + 1 for most, size in sizes.items())
            assert len(set(sizes.values())) <= {2: 4, 4: 6, 8: 8, 16: 10}[num_ranks]
    assert static_units(65, 256, 4) == 80  # an even share is 64, a quarter of it 16


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_features_come_back_to_their_tokens(name: str, num_ranks: int) -> None:
    """Each feature is the sum of its patches; on one device and spread, with the gradient of the patches."""
    batch = batch_of(Cell(layout=Layout(), name="", transforms=(), batch=name))
    model = model_of("dense")
    towers = model.family.towers(model.cfg)

    def features(inputs_UF: torch.Tensor) -> torch.Tensor:
        return inputs_UF.unflatten(0, (-1, 4)).sum(1)

    def placed(own: Tower, axis: Axis):
        leaf = own.inputs_UF.clone().requires_grad_()
        x_TD = spread_features(features(leaf), own.index_T, axis)
        share = (x_TD * torch.arange(x_TD.shape[0])[:, None]).sum() / num_ranks  # every rank has all tokens here
        return own, x_TD.detach(), torch.autograd.grad(share, leaf)[0]

    def on_rank(mesh):
        return placed(split_towers(batch, towers, mesh).towers["vision"], mesh["cp"])

    world = run_virtual(Layout(cp=num_ranks), on_rank)
    whole = batch.towers["vision"]
    _, want_TD, want_UF = placed(whole, Axis(name="cp"))
    assert len({tuple(calls) for calls in world.calls}) == 1
    assert len({tuple(x.shape for x in (v.inputs_UF, v.segments[0].offsets_N)) for v, *_ in world.results}) == 1
    rows = {}
    for tower, x_TD, grad_UF in world.results:
        assert torch.equal(x_TD, want_TD)
        assert tower.segments[0].spread == ""
        used = int(tower.segments[0].offsets_N[-1])
        assert used == 4 * int(tower.items_I.sum())
        assert tower.coords_P4[used:].tolist() == [[0, 0, 1, 1]] * (tower.coords_P4.shape[0] - used)
        assert not tower.inputs_UF[used:].any()
        assert set(tower.ids_P[used:].tolist()) <= {-1}
        for patch, *own in zip(tower.inputs_UF[:used], tower.coords_P4, tower.ids_P, grad_UF, strict=False):
            rows[tuple(patch.tolist())] = own
    assert len(rows) == int(whole.segments[0].offsets_N[-1])
    for patch, *own, grad in zip(whole.inputs_UF, whole.coords_P4, whole.ids_P, want_UF, strict=True):
        if patch.any():
            torch.testing.assert_close(rows[tuple(patch.tolist())], [*own, grad * num_ranks])


def test_rooms_for_segments_are_those_of_a_rank() -> None:
    """Of a static batch as many as a rank's units may have, on every rank; never more than the whole batch has."""
    kind = TowerKind(media=(AUDIO,), inputs=1, rows=2, features=1, values=1, segments_per_unit=(2, 1), matmul_rows=5)
    for items, num_units, rooms in (([1] * 6, 32, (16, 8)), ([1] * 6, 7, (4, 2)), ([4], 4, (8, 4)), ([5], 5, (10, 5))):
        used = sum(items)
        tower = Tower(
            inputs_UF=torch.zeros(num_units, 1),
            coords_P4=torch.zeros(2 * num_units, 4, dtype=torch.int32),
            segments=(offsets([1] * 2 * used, 2 * num_units), offsets([2 * n for n in items], num_units)),
            ids_P=torch.zeros(2 * num_units, dtype=torch.int64),
            items_I=torch.tensor([*items, *[0] * (num_units - len(items))], dtype=torch.int32),
            index_T=torch.zeros(0, dtype=torch.int64),
        )
        world = run_virtual(Layout(cp=4), lambda mesh, tower=tower: split_tower(tower, kind, mesh["cp"])[0])
        for own in world.results:
            assert tuple(segments.num for segments in own.segments) == rooms


def test_items_of_several_segments_and_rows_per_unit() -> None:
    """Sound-like units of 2 rows and 3 features, items of one or two units, segments of one row each and junk."""
    kind = TowerKind(media=(AUDIO,), inputs=1, rows=2, features=3, values=1, segments_per_unit=(2, 1), matmul_rows=5)
    items, fine = [2, 1, 1, 2], [1, 1, 2, 1, 1, 2, 1, 3]
    tower = Tower(
        inputs_UF=torch.arange(7.0)[:, None],
        coords_P4=torch.arange(14, dtype=torch.int32)[:, None].expand(14, 4),
        segments=(offsets(fine, 14), offsets([2 * n for n in items], 7)),
        ids_P=torch.arange(14),
        items_I=torch.tensor([*items, 0, 0, 0], dtype=torch.int32),
        index_T=torch.tensor([-1, 0, 5, 6, 9, 17, -1]),
    )
    x_PD = torch.randn(18, 4, generator=torch.Generator().manual_seed(0))  # a feature is what its place says

    def on_rank(mesh):
        own = split_tower(tower, kind, mesh["cp"])[0]
        batch = split_towers(batch_with(tower), {"audio": kind}, mesh)
        rows = (own.inputs_UF[: int(own.items_I.sum()), 0].long()[:, None] * 3 + torch.arange(3)).flatten()
        size = own.inputs_UF.shape[0] * 3
        features_MD = torch.nn.functional.pad(x_PD[rows], (0, 0, 0, size - rows.numel()))
        return own, spread_features(features_MD, batch.towers["audio"].index_T, mesh["cp"])

    world = run_virtual(Layout(cp=3), on_rank)
    want_TD = torch.cat([torch.zeros(1, 4), x_PD])[tower.index_T + 1]
    lengths: dict[int, list[int]] = {0: [], 1: []}
    for own, x_TD in world.results:
        assert torch.equal(x_TD, want_TD)
        for k, segments in enumerate(own.segments):
            assert int(segments.offsets_N[-1]) == 2 * int(own.items_I.sum())
            lengths[k] += [n for n in segments.offsets_N.diff().tolist() if n]
    assert sorted(lengths[0]) == sorted(fine)
    assert sorted(lengths[1]) == [2, 2, 4, 4]


def offsets(lengths: list[int], num: int) -> Segments:
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)
    return Segments.of(torch.cat([ends, ends[-1:].expand(num - len(lengths))]))


def batch_with(tower: Tower) -> Batch:
    """A batch of text whose tokens take features of one tower."""
    T = tower.index_T.numel()
    zeros_T = torch.zeros(T, dtype=torch.int64)
    return Batch(
        tokens_T=zeros_T,
        positions_3T=torch.zeros(3, T),
        segments=offsets([T], 1),
        labels_T=zeros_T,
        weights_T=torch.ones(T),
        segment_T=zeros_T,
        token_ids_T=zeros_T,
        towers={"audio": tower},
    )
