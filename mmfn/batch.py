"""Samples and packed batches: what a model is given.

A `Sample` is one conversation after tokenization and preprocessing. `mmfn.packing` lays samples end to end in one
packed dimension of static size, the only layout inside a model; what an encoder reads is packed likewise, in a `Tower`.

Legend: T tokens, N segments, U inputs of an encoder, P its rows, F values of an input, I items.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from mmfn import tree
from mmfn.errors import UserError

IGNORE = -100  # label of a token that is not supervised
TEXT, IMAGE, VIDEO, AUDIO = 0, 1, 2, 3  # kinds of tokens; the first three as in `mm_token_type_ids` of transformers

PIECE = 256  # rows that are made floats at a time
Read = TypeVar("Read", "Media", "Tower")
HOST_FIELDS = ("host_N", "items_I", "num_labels")  # what stays in the host's memory wherever a batch is


@tree.register
@dataclass(frozen=True, kw_only=True)
class Segments:
    """Boundaries of independent rows in a packed dimension.

    `offsets_N`: int32[N + 1], from 0, not decreasing; unused entries at the end repeat the last boundary. Positions
    behind the last boundary are padding and belong to no segment. `host_N`: the same on the CPU, wherever the batch is:
    what reads boundaries on the host reads these, and never waits for a device. `spread` names the mesh axis over whose
    ranks the packed dimension is split ("" = whole on this rank); the boundaries are then those of the whole dimension.

    >>> segments = Segments.of(torch.tensor([0, 5, 8, 8], dtype=torch.int32))  # 5 and 3 tokens, and an unused entry
    >>> segments.num, segments.longest
    (3, 5)
    """

    offsets_N: Tensor
    host_N: Tensor
    spread: str = field(default="", metadata={"static": True})

    @staticmethod
    def of(offsets_N: Tensor, spread: str = "") -> "Segments":
        """Segments with their copy on the host, of the same memory where that is the CPU's.

        Two tensors all the same: torch's compiler refuses one that is given twice.
        """
        return Segments(offsets_N=offsets_N, host_N=offsets_N.detach().cpu(), spread=spread)

    @property
    def num(self) -> int:
        """N, the static number of segments, empty ones included."""
        return self.offsets_N.shape[0] - 1

    @property
    def longest(self) -> int:
        """Length of the longest segment, read on the host."""
        return int(self.host_N.diff().max()) if self.num else 0

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Segments":
        """Segments whose boundaries are `fn` of these, on the device and on the host."""
        return replace(self, offsets_N=fn(self.offsets_N), host_N=fn(self.host_N))


@dataclass(frozen=True, kw_only=True)
class Levels:
    """What bytes stand for: `(byte - 255 * mean) / (255 * std)`, with a mean and a std for each channel.

    A row has the values of one channel behind those of another, equally many of each.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def floats(self, bytes_UF: Tensor) -> Tensor:
        """uint8[U, F] -> float32[U, F], on the same device.

        The bits of transformers' image processors (torchvision backend), which fuse 255 into mean and std before they
        use them. On a CPU in pieces that stay in its cache: touching memory takes as long as all else.
        """
        device, num = bytes_UF.device, len(bytes_UF)
        mean, std = ((torch.tensor(v) * 255.0)[:, None].to(device) for v in (self.mean, self.std))
        floats_UF = torch.empty(bytes_UF.shape, dtype=torch.float32, device=device)
        piece = PIECE if device.type == "cpu" else max(1, num)
        for start in range(0, num, piece):
            part_UF = floats_UF[start : start + piece].copy_(bytes_UF[start : start + piece])
            part_UF.view(len(part_UF), len(self.mean), -1).sub_(mean).div_(std)
        return floats_UF


@dataclass(frozen=True, kw_only=True)
class Media:
    """What an encoder reads of one image, video or clip.

    `inputs_UF`: the inputs in the encoder's order (pieces of an image, chunks of sound), float32[U, F], or uint8[U, F]
    with the `levels` that they stand for: a quarter of the memory, up to the device. `grid`: how they lie, (time,
    height, width). `times`: when each of the `grid[0]` steps in time is, in seconds, as the family tells it, and
    `seconds_per_grid`: how long one lasts; () and 0 where the family does not ask. `sound`: the clip of a video that is
    heard along with it, which is one of its sample's audios.
    """

    inputs_UF: Tensor
    grid: tuple[int, int, int]
    times: tuple[float, ...] = ()
    seconds_per_grid: float = 0.0
    sound: "Media | None" = None
    levels: Levels | None = None

    def in_floats(self) -> "Media":
        """The same with float32 inputs."""
        return _in_floats(self)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One tokenized conversation.

    `tokens_T`: int64[T], every placeholder repeated once per feature. `labels_T`: int64[T], the token itself where it
    is supervised and `IGNORE` elsewhere (not shifted). `kinds_T`: int64[T] of TEXT, IMAGE, VIDEO, AUDIO. `images`,
    `videos` and `audios` in the order of their placeholders. `number`: its place in the order of all data, in
    [0, 2**31), which tells its tokens from those of other samples (None: its place in the pack). Raises ValueError for
    one outside.
    """

    tokens_T: Tensor
    labels_T: Tensor
    kinds_T: Tensor
    images: tuple[Media, ...] = ()
    videos: tuple[Media, ...] = ()
    audios: tuple[Media, ...] = ()
    id: str = ""
    number: int | None = None

    def __post_init__(self) -> None:
        if self.number is not None and not 0 <= self.number < 2**31:
            raise UserError(f"sample {self.id!r} has number {self.number} but it must be in [0, 2**31); count from 0")

    def media(self, *kinds: int) -> tuple[Media, ...]:
        """The media of some kinds, kind by kind: `sample.media(IMAGE, VIDEO)`."""
        by_kind = {IMAGE: self.images, VIDEO: self.videos, AUDIO: self.audios}
        return tuple(medium for kind in kinds for medium in by_kind[kind])


@dataclass(frozen=True, kw_only=True)
class TowerKind:
    """How an encoder reads: in units, the least that becomes whole features.

    `media`: the kinds it reads (IMAGE, ...). Of one unit: `inputs` it is made of, `rows` the blocks compute with and
    `features` that come out; vision with 2 x 2 merging has 4 inputs, 4 rows and 1 feature. `values`: F of an input.
    `segments_per_unit`: for each of its lists of segments, how many there may be per unit. `matmul_rows`: the length
    of a segment at which attention costs a block as much as its matrix products, by which items are spread over ranks.
    """

    media: tuple[int, ...]
    inputs: int
    rows: int
    features: int
    values: int
    segments_per_unit: tuple[int, ...] = (1,)
    matmul_rows: int


@dataclass(frozen=True, kw_only=True)
class Laid:
    """What an encoder reads of one sample, laid on the host by the family; all in the order of rows.

    `inputs`: tensors [., F] that lie end to end, float32 or the bytes of the sample's media. `coords_P4`: int32[P, 4],
    what the encoder needs to know of a row's place. `segments`: for each list its lengths in rows; together they cover
    all rows. `items`: lengths in units of what may lie on any rank; no segment of any list crosses from one to the
    next. `index_T`: int64[T], the feature (of this sample) that replaces each token's embedding, -1 where none does.
    """

    inputs: tuple[Tensor, ...]
    coords_P4: Tensor
    segments: tuple[tuple[int, ...], ...]
    items: tuple[int, ...]
    index_T: Tensor


@tree.register
@dataclass(frozen=True, kw_only=True)
class Tower:
    """What one encoder reads of a batch.

    `inputs_UF`: float[U, F], or uint8[U, F] with the `levels` that they stand for until `to` brings them to the device
    (padding: 0). `coords_P4`: int32[P, 4], see `Laid` (padding: 0, 0, 1, 1). `segments`: one or more lists
    (frames, windows) of what attends to itself alone. `ids_P`: int64[P], which row it is, wherever it lies:
    `number << 32 | place among its sample's rows`, or -1 (padding). `items_I`: int32[I] on the host, lengths in units
    of what may lie on any rank, 0 at the end. `index_T`: int64[T], the row of the features that replaces the token's
    embedding, -1 where none does; on several ranks the features of all ranks lie end to end.
    """

    inputs_UF: Tensor
    coords_P4: Tensor
    segments: tuple[Segments, ...]
    ids_P: Tensor
    items_I: Tensor
    index_T: Tensor
    levels: Levels | None = field(default=None, metadata={"static": True})


@tree.register
@dataclass(frozen=True, kw_only=True)
class Ahead:
    """What a token sees and predicts one place further ahead, shifted on the host within its segment.

    `tokens_T`: int64[T], the next token (0 where there is none). `labels_T`, `weights_T`, `num_labels`: as those of
    `Batch`, of the token behind the one that `Batch.labels_T` names. `index_T`: by tower, the feature that replaces the
    next token.
    """

    tokens_T: Tensor
    labels_T: Tensor
    weights_T: Tensor
    index_T: Mapping[str, Tensor]
    num_labels: Tensor | None = None


@tree.register
@dataclass(frozen=True, kw_only=True)
class Batch:
    """One packed batch. All shapes are static for given budgets.

    `tokens_T`: int64[T]. `positions_3T`: float32[3, T], (temporal, height, width) rope positions. `segments`: one per
    sample. `labels_T`: int64[T], the token to predict at each place (already shifted within its segment) or `IGNORE`.
    `weights_T`: float32[T], the weight of each token's cross entropy (see `mmfn.train.objective`). `segment_T`:
    int64[T], the segment of each token, or N (one past the last) where a token is padding: behind the last segment, or
    at the end of one whose length was rounded up (no other token attends to it). `token_ids_T`: int64[T], which token
    it is, wherever it lies: `number << 32 | place in its sample`, or -1 (padding). `towers`: what encoders read, by
    name. `ahead`: one for each further token that is predicted. `aux_weight`: 0-D, what losses of the whole batch
    count. `is_weighed`: whether `weights_T` and `aux_weight` are those of a global step. `salts`: those of the dropout
    masks of a training step, by path (`mmfn.lora.salts_of`); None, as everywhere else: nothing is dropped.
    `num_labels`: 0-D int64 on the host, how many tokens have a label and a weight; None: whoever asks counts them on
    the device.
    """

    tokens_T: Tensor
    positions_3T: Tensor
    segments: Segments
    labels_T: Tensor
    weights_T: Tensor
    segment_T: Tensor
    token_ids_T: Tensor
    towers: Mapping[str, Tower] = field(default_factory=dict)
    ahead: tuple[Ahead, ...] = ()
    aux_weight: Tensor = field(default_factory=lambda: torch.zeros(()))
    salts: Mapping[str, Tensor] | None = None
    num_labels: Tensor | None = None
    is_weighed: bool = field(default=False, metadata={"static": True})

    @property
    def num_segments(self) -> int:
        """N, the static number of segments, empty ones included."""
        return self.segments.num


def to(batch: Batch, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
    """The batch on a device, as a model takes it (`in_floats`), but for what stays on the host (`HOST_FIELDS`).

    With `dtype`, the inputs of towers are cast too (weights stay float32 or wider).
    """
    moved = in_floats(tree.map_with_path(lambda path, x: x if is_on_host(path) else x.to(device), batch))
    if dtype is None:
        return moved
    towers = {name: replace(tower, inputs_UF=tower.inputs_UF.to(dtype)) for name, tower in moved.towers.items()}
    return replace(moved, towers=towers)


def in_floats(batch: Batch) -> Batch:
    """The batch where it is, its bytes made the float32 that they stand for."""
    return replace(batch, towers={name: _in_floats(tower) for name, tower in batch.towers.items()})


def _in_floats(x: Read) -> Read:
    return x if x.levels is None else replace(x, inputs_UF=x.levels.floats(x.inputs_UF), levels=None)


def is_on_host(path: str) -> bool:
    """Whether a leaf of a batch stays in the host's memory."""
    return path.rpartition("/")[2] in HOST_FIELDS


def map_tokens(batch: Batch, fn: Callable[[Tensor], Tensor]) -> Batch:
    """`fn` of every tensor that has a value per token (its last dim), those of towers and of what is ahead too.

    What is known of the number of labels is not known of what `fn` gives.
    """
    return replace(
        batch,
        tokens_T=fn(batch.tokens_T),
        positions_3T=fn(batch.positions_3T),
        labels_T=fn(batch.labels_T),
        weights_T=fn(batch.weights_T),
        segment_T=fn(batch.segment_T),
        token_ids_T=fn(batch.token_ids_T),
        towers={name: replace(tower, index_T=fn(tower.index_T)) for name, tower in batch.towers.items()},
        ahead=tuple(tree.map(fn, replace(further, num_labels=None)) for further in batch.ahead),
        num_labels=None,
    )
