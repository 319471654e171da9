"""Samples and packed batches: what a model is given.

A `Sample` is one conversation after tokenization and preprocessing. `pack` lays samples end to end in one packed
dimension of static size, the only layout inside a model. Legend: T tokens, P patches, F values of a patch, N segments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmfn import tree

IGNORE = -100  # label of a token that is not supervised
TEXT, IMAGE, VIDEO = 0, 1, 2  # kinds of tokens, as in the `mm_token_type_ids` of transformers


@tree.register
@dataclass(frozen=True, kw_only=True)
class Segments:
    """Boundaries of independent rows in a packed dimension.

    `offsets_N`: int32[N + 1], from 0, not decreasing; unused entries at the end repeat the last boundary. Positions
    behind the last boundary are padding and belong to no segment. `spread` names the mesh axis over whose ranks the
    packed dimension is split ("" = whole on this rank); the boundaries are then those of the whole dimension.
    """

    offsets_N: Tensor
    spread: str = field(default="", metadata={"static": True})


@dataclass(frozen=True, kw_only=True)
class Media:
    """The patches of one image or video: `patches_PF` float32[t*h*w, F] in merge-block order and its grid (t, h, w)."""

    patches_PF: Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One tokenized conversation.

    `tokens_T`: int64[T], every visual placeholder repeated once per merged feature. `labels_T`: int64[T], the token
    itself where it is supervised and `IGNORE` elsewhere (not shifted). `kinds_T`: int64[T] of TEXT, IMAGE, VIDEO.
    `images` and `videos` in the order of their placeholders. `number`: its place in the order of all data, in
    [0, 2**31), which tells its tokens from those of other samples (None: its place in the pack). Raises ValueError for
    one outside.
    """

    tokens_T: Tensor
    labels_T: Tensor
    kinds_T: Tensor
    images: tuple[Media, ...] = ()
    videos: tuple[Media, ...] = ()
    id: str = ""
    number: int | None = None

    def __post_init__(self) -> None:
        if self.number is not None and not 0 <= self.number < 2**31:
            raise ValueError(f"sample {self.id!r} has number {self.number} but it must be in [0, 2**31); count from 0")

    @property
    def num_patches(self) -> int:
        """Patches of all images and videos."""
        return sum(m.patches_PF.shape[0] for m in (*self.images, *self.videos))

    @property
    def num_frames(self) -> int:
        """Attention segments of the vision tower: one per image and per temporal grid of a video."""
        return sum(m.grid[0] for m in (*self.images, *self.videos))


@tree.register
@dataclass(frozen=True, kw_only=True)
class Visual:
    """Patches of all images and videos of a batch.

    `patches_PF`: float[P, F]. `coords_P4`: int32[P, 4], each patch's row, column, and its grid's height and width, in
    patches (padding: 0, 0, 1, 1). `segments`: one per frame. Consecutive merge-block patches form one feature.
    `patch_ids_P`: int64[P], which patch it is, wherever it lies: `number << 32 | place among its sample's patches`, or
    -1 (padding).
    """

    patches_PF: Tensor
    coords_P4: Tensor
    segments: Segments
    patch_ids_P: Tensor


@tree.register
@dataclass(frozen=True, kw_only=True)
class Batch:
    """One packed batch. All shapes are static for given budgets.

    `tokens_T`: int64[T]. `positions_3T`: int64[3, T], (temporal, height, width) rope positions. `segments`: one per
    sample. `labels_T`: int64[T], the token to predict at each place (already shifted within its segment) or `IGNORE`.
    `weights_T`: float32[T], the weight of each token's cross entropy (see `mmfn.train.objective`). `feature_index_T`:
    int64[T], the row of the visual features that replaces the token's embedding, or -1 for text. `segment_T`:
    int64[T], the segment of each token, or N (one past the last) where a token is padding: behind the last segment, or
    at the end of one whose length was rounded up (no other token attends to it). `token_ids_T`: int64[T], which token
    it is, wherever it lies: `number << 32 | place in its sample`, or -1 (padding). `aux_weight`: 0-D, what auxiliary
    losses of the whole batch count, 0 until a step weighs it. `salts`: those of the dropout masks of a training step,
    by path (`mmfn.lora.salts_of`); None, as everywhere else: nothing is dropped.
    """

    tokens_T: Tensor
    positions_3T: Tensor
    segments: Segments
    labels_T: Tensor
    weights_T: Tensor
    feature_index_T: Tensor
    segment_T: Tensor
    token_ids_T: Tensor
    visual: Visual
    aux_weight: Tensor = field(default_factory=lambda: torch.zeros(()))
    salts: Mapping[str, Tensor] | None = None

    @property
    def num_segments(self) -> int:
        """N, the static number of segments, empty ones included."""
        return self.segments.offsets_N.shape[0] - 1


def pack(
    samples: Sequence[Sample],
    positions: Sequence[Tensor],
    *,
    merge_size: int,
    patch_values: int,
    num_tokens: int | None = None,
    num_patches: int | None = None,
    num_segments: int | None = None,
    num_frames: int | None = None,
    segment_multiple: int = 1,
) -> Batch:
    """Lay samples end to end. The four `num_*` are static sizes to pad to; default: exactly what the samples need.

    `positions[i]`: int64[3, T_i], the family's rope positions of sample i. `patch_values`: F. Every segment is padded
    at its end to a multiple of `segment_multiple` tokens. Weights are 1 where a token is supervised. Raises ValueError
    when the samples exceed a size, when a sample's placeholders do not match its media, and for tensors whose shapes
    disagree.
    """
    for sample, own in zip(samples, positions, strict=True):
        _check_shapes(sample, own, merge_size, patch_values)
        _check_placeholders(sample, merge_size)
    ids = [_ids(s, i, s.tokens_T.numel()) for i, s in enumerate(samples)]
    patch_ids = [_ids(s, i, s.num_patches) for i, s in enumerate(samples)]
    pads = [-s.tokens_T.numel() % segment_multiple for s in samples]
    samples = [_pad_end(s, n) for s, n in zip(samples, pads, strict=True)]
    positions = [pad(own, (0, n)) for own, n in zip(positions, pads, strict=True)]
    media = [m for s in samples for m in (*s.images, *s.videos)]
    used_tokens = sum(s.tokens_T.numel() for s in samples)
    T = _size("tokens", num_tokens, used_tokens)
    P = _size("patches", num_patches, sum(s.num_patches for s in samples))
    if P % merge_size**2:
        raise ValueError(f"num_patches is {P} but must be a multiple of merge_size**2 = {merge_size**2}; round it up")
    tail = T - used_tokens
    labels_T = torch.cat([*(_shift(s.labels_T) for s in samples), torch.full((tail,), IGNORE)])
    lengths = [s.tokens_T.numel() for s in samples]
    N = _size("segments", num_segments, len(lengths))
    runs = [run for i, n in enumerate(pads) for run in ((i, lengths[i] - n), (N, n))]
    segments, sizes = torch.tensor([*runs, (N, tail)]).unbind(1)
    frames = [h * w for m in media for t, h, w in [m.grid] for _ in range(t)]
    return Batch(
        tokens_T=torch.cat([*(s.tokens_T for s in samples), torch.zeros(tail, dtype=torch.int64)]),
        positions_3T=torch.cat([*positions, torch.zeros(3, tail, dtype=torch.int64)], dim=1),
        segments=Segments(offsets_N=_offsets(lengths, N)),
        labels_T=labels_T,
        weights_T=(labels_T != IGNORE).float(),
        feature_index_T=_feature_index(samples, T, merge_size),
        segment_T=torch.repeat_interleave(segments, sizes),
        token_ids_T=_pad_ids([pad(own, (0, n), value=-1) for own, n in zip(ids, pads, strict=True)], T),
        visual=Visual(
            patches_PF=_pad(torch.cat([torch.zeros(0, patch_values), *(m.patches_PF for m in media)]), P),
            coords_P4=_coords(media, P, merge_size),
            segments=Segments(offsets_N=_offsets(frames, _size("frames", num_frames, len(frames)))),
            patch_ids_P=_pad_ids(patch_ids, P),
        ),
    )


def to(batch: Batch, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
    """The batch on another device; with `dtype`, patches are cast too (weights stay float32 or wider)."""
    moved: Batch = tree.map(lambda x: x.to(device), batch)
    if dtype is None:
        return moved
    return replace(moved, visual=replace(moved.visual, patches_PF=moved.visual.patches_PF.to(dtype)))


def _size(what: str, asked: int | None, used: int) -> int:
    if asked is not None and used > asked:
        raise ValueError(f"the samples hold {used} {what} but the batch has room for {asked}; raise the {what} budget")
    return used if asked is None else asked


def _pad_end(sample: Sample, num: int) -> Sample:
    """The sample with `num` tokens of text at its end that are not supervised."""
    return replace(
        sample,
        tokens_T=pad(sample.tokens_T, (0, num)),
        labels_T=pad(sample.labels_T, (0, num), value=IGNORE),
        kinds_T=pad(sample.kinds_T, (0, num), value=TEXT),
    )


def _shift(labels_T: Tensor) -> Tensor:
    return torch.cat([labels_T[1:], labels_T.new_full((min(1, labels_T.numel()),), IGNORE)])


def _ids(sample: Sample, place: int, num: int) -> Tensor:
    """Ids of `num` tokens or patches of the sample at a place of the pack."""
    return torch.arange(num) | (place if sample.number is None else sample.number) << 32


def _pad_ids(ids: Sequence[Tensor], num: int) -> Tensor:
    used = sum(own.numel() for own in ids)
    return torch.cat([*ids, torch.full((num - used,), -1)])


def _offsets(lengths: Sequence[int], num: int) -> Tensor:
    ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return torch.cat([ends, ends[-1:].expand(num - len(lengths))]).to(torch.int32)


def _pad(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


def _check_shapes(sample: Sample, positions_3T: Tensor, merge_size: int, patch_values: int) -> None:
    T = sample.tokens_T.numel()
    for name, x, shape in (
        ("labels_T", sample.labels_T, [T]),
        ("kinds_T", sample.kinds_T, [T]),
        ("positions", positions_3T, [3, T]),
    ):
        if list(x.shape) != shape:
            raise ValueError(
                f"sample {sample.id!r} has {T} tokens but {name} of shape {list(x.shape)}; make it {shape}"
            )
    for m in (*sample.images, *sample.videos):
        t, h, w = m.grid
        if list(m.patches_PF.shape) != [t * h * w, patch_values] or h % merge_size or w % merge_size:
            raise ValueError(
                f"sample {sample.id!r} has media with grid {m.grid} and patches of shape {list(m.patches_PF.shape)}, "
                f"not [t * h * w, {patch_values}] with h and w multiples of {merge_size}; preprocess it for this model"
            )


def _check_placeholders(sample: Sample, merge_size: int) -> None:
    for kind, name, media in ((IMAGE, "image", sample.images), (VIDEO, "video", sample.videos)):
        places = int((sample.kinds_T == kind).sum())
        features = sum(m.patches_PF.shape[0] for m in media) // merge_size**2
        if places != features:
            raise ValueError(
                f"sample {sample.id!r} has {places} {name} placeholder tokens but its {len(media)} {name}s give "
                f"{features} features; make the text and the media agree"
            )


def _coords(media: Sequence[Media], P: int, merge_size: int) -> Tensor:
    """Row, column, height and width of every patch: int32[P, 4]."""
    parts = [_grid_coords(m.grid, merge_size) for m in media]
    used = sum(x.shape[0] for x in parts)
    return torch.cat([*parts, torch.tensor([[0, 0, 1, 1]], dtype=torch.int32).expand(P - used, 4)])


@lru_cache(maxsize=256)
def _grid_coords(grid: tuple[int, int, int], merge_size: int) -> Tensor:
    """Of one grid, in merge-block order (block row, block column, row, column). Shared between calls: never written."""
    t, h, w = grid
    row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    blocks = (h // merge_size, merge_size, w // merge_size, merge_size)
    row, col = (x.reshape(blocks).transpose(1, 2).flatten() for x in (row, col))
    size = torch.tensor([h, w]).expand(h * w, 2)
    return torch.cat([row[:, None], col[:, None], size], dim=1).repeat(t, 1).to(torch.int32)


def _feature_index(samples: Sequence[Sample], T: int, merge_size: int) -> Tensor:
    """Features are numbered sample by sample, images before videos; -1 marks text."""
    parts, first = [], 0
    for s in samples:
        index_T = torch.full_like(s.kinds_T, -1)
        for kind, media in ((IMAGE, s.images), (VIDEO, s.videos)):
            if media:
                is_kind_T = s.kinds_T == kind
                index_T = torch.where(is_kind_T, is_kind_T.cumsum(0) + (first - 1), index_T)
                first += sum(m.patches_PF.shape[0] for m in media) // merge_size**2
        parts.append(index_T)
    used = sum(x.shape[0] for x in parts)
    return torch.cat([*parts, torch.full((T - used,), -1, dtype=torch.int64)])
