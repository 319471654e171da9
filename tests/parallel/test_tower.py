"""Frames spread over ranks: balance, static sizes, and that features come back to their tokens."""

import itertools
import random

import pytest
import torch

from mmfn.parallel.context.tower_split import assign_frames, frame_cost, split_tower, spread_features, static_patches
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.mesh.virtual import run_virtual
from tests.parallel.conformance import BATCHES, Cell, batch_of

MATMUL = 56


def test_cost_is_that_of_matmuls_and_attention() -> None:
    """FLOPs of one block, counted: 4 projections and 2 products of the feed-forward layer, scores and values."""
    D, F = 8, 12
    for p in (4, 16, 100):
        flops = p * (4 * 2 * D * D + 2 * 2 * D * F) + 2 * 2 * p * p * D
        assert flops == 4 * D * frame_cost(p, 2 * D + F)


def test_the_dearest_frame_goes_first_and_the_largest_load_is_near_the_best() -> None:
    r = random.Random(0)
    for _ in range(20):
        lengths, num_ranks = [4 * r.randint(0, 30) for _ in range(r.randint(1, 7))], r.randint(2, 3)
        costs = [frame_cost(n, MATMUL) for n in lengths]

        def largest(ranks: tuple[int, ...] | list[int], costs: list[int] = costs, num_ranks: int = num_ranks) -> int:
            return max(sum(c for c, rank in zip(costs, ranks, strict=True) if rank == i) for i in range(num_ranks))

        best = min(map(largest, itertools.product(range(num_ranks), repeat=len(lengths))))
        assert largest(assign_frames(lengths, num_ranks, MATMUL)) <= best * (4 / 3)
    assert assign_frames([4, 16, 4, 8], 2, MATMUL) == [1, 0, 1, 1]
    assert assign_frames([4, 4, 4], 2, MATMUL) == [0, 1, 0]  # ties: the earlier frame, the lower rank


def test_few_static_sizes_that_hold_what_is_needed() -> None:
    for num_patches in (0, 4, 36, 1024):
        sizes = {most: static_patches(most, num_patches, 4, 4) for most in range(0, num_patches + 1, 4)}
        assert all(size >= most and size >= 4 and size % 4 == 0 for most, size in sizes.items())
        assert len(set(sizes.values())) <= 16
    assert static_patches(260, 1024, 4, 4) == 320  # an even share is 256, a quarter of it 64


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_features_come_back_to_their_tokens(name: str, num_ranks: int) -> None:
    """Each feature is the sum of its patches; on one device and spread, with the gradient of the patches."""
    batch = batch_of(Cell(layout=Layout(), name="", transforms=(), batch=name))

    def features(patches_PF: torch.Tensor) -> torch.Tensor:
        return patches_PF.unflatten(0, (-1, 4)).sum(1)

    def placed(own, axis: Axis):
        leaf = own.visual.patches_PF.clone().requires_grad_()
        x_TD = spread_features(features(leaf), own.feature_index_T, axis)
        share = (x_TD * torch.arange(x_TD.shape[0])[:, None]).sum() / num_ranks  # every rank has all tokens here
        return own.visual, x_TD.detach(), torch.autograd.grad(share, leaf)[0]

    def on_rank(mesh):
        return placed(split_tower(batch, mesh["cp"], 2, MATMUL), mesh["cp"])

    world = run_virtual(Layout(cp=num_ranks), on_rank)
    _, want_TD, want_PF = placed(batch, Axis(name="cp"))
    assert len({tuple(calls) for calls in world.calls}) == 1
    assert len({tuple(x.shape for x in (v.patches_PF, v.segments.offsets_N)) for v, *_ in world.results}) == 1
    rows = {}
    for visual, x_TD, grad_PF in world.results:
        assert torch.equal(x_TD, want_TD)
        assert visual.segments.spread == ""
        used = int(visual.segments.offsets_N[-1])
        assert visual.coords_P4[used:].tolist() == [[0, 0, 1, 1]] * (visual.coords_P4.shape[0] - used)
        assert not visual.patches_PF[used:].any()
        assert set(visual.patch_ids_P[used:].tolist()) <= {-1}
        for patch, *own in zip(visual.patches_PF[:used], visual.coords_P4, visual.patch_ids_P, grad_PF, strict=False):
            rows[tuple(patch.tolist())] = own
    assert len(rows) == int(batch.visual.segments.offsets_N[-1])
    ids_P = batch.visual.patch_ids_P
    for patch, *own, grad in zip(batch.visual.patches_PF, batch.visual.coords_P4, ids_P, want_PF, strict=True):
        if patch.any():
            torch.testing.assert_close(rows[tuple(patch.tolist())], [*own, grad * num_ranks])


def test_a_wrong_merge_size_is_refused() -> None:
    batch = batch_of(Cell(layout=Layout(), name="", transforms=()))
    with pytest.raises(ValueError, match="but merge_size is 3; pass the model's own merge_size"):
        split_tower(batch, Axis(name="cp", size=2), 3, MATMUL)
