"""The vision tower under context parallelism: whole frames are spread over the ranks, features come back to tokens.

A frame (an image, or one temporal grid of a video) attends to itself alone, so it runs on one rank, by the tower's
plain attention. Every rank has the same number of patches, padding included, and runs the tower whether or not it has
a frame. Legend: P patches, N frames, M features, D width, T tokens, W ranks.
"""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmfn.batch import Batch, Segments, Visual
from mmfn.ops import place_features
from mmfn.parallel.mesh.axis import Axis, all_gather

SITE = "features"
SIZES = 4  # steps of the static size between an even share and the next


def frame_cost(num_patches: int, matmul_patches: int) -> int:
    """Encoder FLOPs of one frame, up to a factor: matmuls, linear in its patches, and attention, quadratic.

    A patch costs `8 D**2 + 4 D F` FLOPs in the matmuls of a block and `4 D` per patch it attends to, so the two are
    equal at `matmul_patches = 2 D + F` patches.
    """
    return num_patches * (num_patches + matmul_patches)


def assign_frames(lengths: list[int], num_ranks: int, matmul_patches: int) -> list[int]:
    """The rank of each frame of `lengths[n]` patches: the dearest first, each to the rank with the least cost so far.

    Ties go to the earlier frame and the lower rank. The largest load is at most 4/3 of the smallest possible one.
    Source: Graham 1969 (longest processing time first).
    """
    loads, ranks = [0] * num_ranks, [0] * len(lengths)
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        ranks[n] = loads.index(min(loads))
        loads[ranks[n]] += frame_cost(lengths[n], matmul_patches)
    return ranks


def static_patches(most: int, num_patches: int, num_ranks: int, merged: int) -> int:
    """Patches every rank has room for when the fullest needs `most` of a batch with `num_patches`.

    A multiple of a quarter of the even share and of `merged` patches, at least one of those: few shapes occur.
    """
    unit = merged * max(1, -(-num_patches // (SIZES * num_ranks * merged)))
    return max(1, -(-most // unit)) * unit


def split_tower(batch: Batch, axis: Axis, merge_size: int, matmul_patches: int) -> Batch:
    """This rank's frames on the host; `feature_index_T` then counts the features of all ranks, by rank.

    Every rank makes the same assignment from the same batch, without communication. Raises ValueError for frames that
    are no multiple of `merge_size**2` patches.
    """
    visual, merged = batch.visual, merge_size**2
    offsets = visual.segments.offsets_N.tolist()
    lengths = [end - start for start, end in pairwise(offsets)]
    if any(length % merged for length in lengths):
        raise ValueError(
            f"frames have {lengths} patches but merge_size is {merge_size}; pass the model's own merge_size, whose "
            "square divides them all, to context_parallel"
        )
    ranks = assign_frames(lengths, axis.size, matmul_patches)
    frames = [[n for n, rank in enumerate(ranks) if rank == r] for r in range(axis.size)]
    most = max(sum(lengths[n] for n in own) for own in frames)
    size = static_patches(most, visual.patches_PF.shape[0], axis.size, merged)
    new_M = torch.full((offsets[-1] // merged,), -1)
    for rank, own in enumerate(frames):
        features = torch.cat([new_M[:0], *(torch.arange(*_span(offsets, n, merged)) for n in own)])
        new_M[features] = rank * (size // merged) + torch.arange(features.numel())
    return replace(
        batch,
        visual=_take(visual, frames[axis.index], offsets, size),
        feature_index_T=pad(new_M, (1, 0), value=-1)[batch.feature_index_T + 1],
    )


def spread_features(features_MD: Tensor, index_T: Tensor, axis: Axis) -> Tensor:
    """`ops.place_features` from the features of all ranks: one all-gather, and one reduce-scatter in the backward."""
    return place_features(all_gather(features_MD, axis, SITE), index_T)


def _span(offsets: list[int], n: int, merged: int) -> tuple[int, int]:
    return offsets[n] // merged, offsets[n + 1] // merged


def _take(visual: Visual, frames: list[int], offsets: list[int], size: int) -> Visual:
    """Some frames of a tower's input, padded to `size` patches."""
    patches = [torch.arange(offsets[n], offsets[n + 1]) for n in frames]
    order = torch.cat([torch.arange(0), *patches])
    num_pads = size - order.numel()
    pads_P4 = torch.tensor([[0, 0, 1, 1]], dtype=visual.coords_P4.dtype).expand(num_pads, 4)
    ends = torch.tensor([0, *(p.numel() for p in patches)]).cumsum(0).to(visual.segments.offsets_N.dtype)
    unused = len(offsets) - ends.numel()
    return Visual(
        patches_PF=pad(visual.patches_PF[order], (0, 0, 0, num_pads)),
        coords_P4=torch.cat([visual.coords_P4[order], pads_P4]),
        segments=Segments(offsets_N=torch.cat([ends, ends[-1:].expand(unused)])),
        patch_ids_P=pad(visual.patch_ids_P[order], (0, num_pads), value=-1),
    )
