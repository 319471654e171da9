"""`pack`: samples end to end in one packed batch of static size. Families call it (`Family.pack`), and nobody else.

Legend: T tokens, N segments, U inputs of an encoder, P its rows, F values of an input, I items.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmfn.batch import IGNORE, Ahead, Batch, Laid, Sample, Segments, Tower, TowerKind
from mmfn.errors import UserError

EMPTY = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Static sizes of a batch; None, or absent: what the samples need.

    `units`: of each tower, by name. Every segment is padded at its end to a multiple of `segment_multiple` tokens.
    """

    tokens: int | None = None
    segments: int | None = None
    units: Mapping[str, int] = field(default_factory=dict)
    segment_multiple: int = 1


def num_units(sample: Sample, kind: TowerKind) -> int:
    """Units that an encoder reads of a sample, as many as its family must lay."""
    return sum(medium.inputs_UF.shape[0] for medium in sample.media(*kind.media)) // kind.inputs


def read_alike(samples: Sequence[Sample], kinds: Mapping[str, TowerKind]) -> Sequence[Sample]:
    """The samples, their media in floats where those of one tower are bytes that do not all stand for the same."""
    read = [{m.levels for sample in samples for m in sample.media(*kind.media)} for kind in kinds.values()]
    if all(len(levels) < 2 for levels in read):
        return samples
    return [
        replace(
            sample,
            images=tuple(medium.in_floats() for medium in sample.images),
            videos=tuple(medium.in_floats() for medium in sample.videos),
        )
        for sample in samples
    ]


def pack(
    samples: Sequence[Sample],
    positions: Sequence[Tensor],
    laid: Sequence[Mapping[str, Laid]],
    kinds: Mapping[str, TowerKind],
    sizes: Sizes,
    num_ahead: int = 0,
) -> Batch:
    """Lay samples end to end.

    `positions[i]`: float32[3, T_i], the rope positions of sample i, and `laid[i]` what each of the towers `kinds` reads
    of it. `num_ahead`: further tokens that are predicted. Weights are 1 where a token is supervised. Raises ValueError
    when the samples exceed a size, for a size of an unknown tower, for a sample without tokens and tensors whose shapes
    disagree, and for what is laid otherwise than `Laid` and the tower's kind say.

    >>> Two samples of 3 and 2 tokens, segment_multiple 4, tokens 12, give segment_T
    >>> [0, 0, 0, N, 1, 1, N, N, N, N, N, N] and offsets [0, 4, 8]
    """
    for sample, own, towers in zip(samples, positions, laid, strict=True):
        _check_shapes(sample, own)
        _check_laid(sample, towers, kinds)
    if odd := sorted(sizes.units.keys() - kinds.keys()):
        raise UserError(f"there is a size for tower {odd[0]!r} but the model has {', '.join(kinds) or 'none'}; drop it")
    places = _Places.of([s.tokens_T.numel() for s in samples], sizes)
    units = {name: [sum(own[name].items) for own in laid] for name in kinds}
    index = {name: _features([own[name] for own in laid], units[name], kind) for name, kind in kinds.items()}
    labels = [_shift(s.labels_T, IGNORE) for s in samples]
    labels_T = places.join(labels, IGNORE)
    lengths = [n + end for n, end in zip(places.lengths, places.pads, strict=True)]
    return Batch(
        tokens_T=places.join([s.tokens_T for s in samples], 0),
        positions_3T=places.join(positions, 0.0, torch.zeros(3, 0)),
        segments=Segments.of(_offsets(lengths, places.num)),
        labels_T=labels_T,
        weights_T=(labels_T != IGNORE).float(),
        segment_T=places.join([torch.full((n,), i) for i, n in enumerate(places.lengths)], places.num),
        token_ids_T=places.join([_ids(s, i, s.tokens_T.numel()) for i, s in enumerate(samples)], -1),
        towers={
            name: _tower(
                kind,
                samples,
                [own[name] for own in laid],
                units[name],
                places.join(index[name], -1),
                _size(f"units of {name}", sizes.units.get(name), sum(units[name])),
                is_static=name in sizes.units,
            )
            for name, kind in kinds.items()
        },
        ahead=_further([s.tokens_T for s in samples], labels, index, places, num_ahead),
    )


@dataclass(frozen=True)
class _Places:
    """Where samples lie in the packed dimension: their `lengths`, the `pads` behind each, the `tail`, N."""

    lengths: list[int]
    pads: list[int]
    tail: int
    num: int

    @staticmethod
    def of(lengths: list[int], sizes: Sizes) -> "_Places":
        pads = [-n % sizes.segment_multiple for n in lengths]
        used = sum(lengths) + sum(pads)
        num = _size("segments", sizes.segments, len(lengths))
        return _Places(lengths, pads, _size("tokens", sizes.tokens, used) - used, num)

    def join(self, parts: Sequence[Tensor], value: float, empty: Tensor = EMPTY) -> Tensor:
        """Tensors with a value per token of each sample, end to end, `value` where there is padding."""
        padded = [pad(x, (0, n), value=value) for x, n in zip(parts, self.pads, strict=True)]
        return torch.cat([empty, *padded, empty.new_full((*empty.shape[:-1], self.tail), value)], -1)


def _features(laid: Sequence[Laid], units: Sequence[int], kind: TowerKind) -> list[Tensor]:
    """Of every sample the features, among those of all samples, that replace its tokens."""
    starts = [kind.features * sum(units[:i]) for i in range(len(units))]
    return [torch.where(x.index_T >= 0, x.index_T + n, -1) for x, n in zip(laid, starts, strict=True)]


def _tower(
    kind: TowerKind,
    samples: Sequence[Sample],
    laid: Sequence[Laid],
    units: Sequence[int],
    index_T: Tensor,
    size: int,
    *,
    is_static: bool,
) -> Tower:
    """One encoder's input of all samples, with room for `size` units; where that is static, so is all else."""
    rest = size - sum(units)
    ids = [_ids(s, i, n * kind.rows) for i, (s, n) in enumerate(zip(samples, units, strict=True))]
    lists = [[n for own in laid for n in own.segments[k]] for k in range(len(kind.segments_per_unit))]
    rooms = [size * most if is_static else len(x) for x, most in zip(lists, kind.segments_per_unit, strict=True)]
    items = torch.tensor([n for own in laid for n in own.items], dtype=torch.int32)
    no_place_P4 = torch.tensor([[0, 0, 1, 1]], dtype=torch.int32).expand(rest * kind.rows, 4)
    levels = next((medium.levels for sample in samples for medium in sample.media(*kind.media)), None)
    no_inputs_UF = torch.zeros(rest * kind.inputs, kind.values, dtype=torch.uint8 if levels else None)
    return Tower(
        inputs_UF=torch.cat([*(x for own in laid for x in own.inputs), no_inputs_UF]),
        coords_P4=torch.cat([*(own.coords_P4 for own in laid), no_place_P4]),
        segments=tuple(Segments.of(_offsets(x, room)) for x, room in zip(lists, rooms, strict=True)),
        ids_P=torch.cat([*ids, torch.full((rest * kind.rows,), -1)]),
        items_I=pad(items, (0, size - len(items) if is_static else 0)),
        index_T=index_T,
        levels=levels,
    )


def _further(
    tokens: Sequence[Tensor],
    labels: Sequence[Tensor],
    index: Mapping[str, Sequence[Tensor]],
    places: _Places,
    num_ahead: int,
) -> tuple[Ahead, ...]:
    """Tokens, labels and features shifted by one place more each time, within each sample."""
    found = []
    for _ in range(num_ahead):
        tokens, labels = [_shift(x, 0) for x in tokens], [_shift(x, IGNORE) for x in labels]
        index = {name: [_shift(x, -1) for x in parts] for name, parts in index.items()}
        labels_T = places.join(labels, IGNORE)
        found.append(
            Ahead(
                tokens_T=places.join(tokens, 0),
                labels_T=labels_T,
                weights_T=(labels_T != IGNORE).float(),
                index_T={name: places.join(parts, -1) for name, parts in index.items()},
            )
        )
    return tuple(found)


def _size(what: str, asked: int | None, used: int) -> int:
    if asked is not None and used > asked:
        raise UserError(f"the samples hold {used} {what} but the batch has room for {asked}; raise the {what} budget")
    return used if asked is None else asked


def _shift(x_T: Tensor, value: int) -> Tensor:
    """The next token's value at each token, `value` at the last one."""
    return pad(x_T[1:], (0, min(1, x_T.numel())), value=value)


def _ids(sample: Sample, place: int, num: int) -> Tensor:
    """Ids of `num` tokens or rows of the sample at a place of the pack."""
    return torch.arange(num) | (place if sample.number is None else sample.number) << 32


def _offsets(lengths: Sequence[int], num: int) -> Tensor:
    ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return torch.cat([ends, ends[-1:].expand(num - len(lengths))]).to(torch.int32)


def _check_shapes(sample: Sample, positions_3T: Tensor) -> None:
    T = sample.tokens_T.numel()
    if not T:
        raise UserError(f"sample {sample.id!r} has no tokens; leave it out")
    for name, x, shape in (
        ("labels_T", sample.labels_T, [T]),
        ("kinds_T", sample.kinds_T, [T]),
        ("positions", positions_3T, [3, T]),
    ):
        if list(x.shape) != shape:
            raise UserError(f"sample {sample.id!r} has {T} tokens but {name} of shape {list(x.shape)}; make it {shape}")


def _check_laid(sample: Sample, laid: Mapping[str, Laid], kinds: Mapping[str, TowerKind]) -> None:
    """Raise ValueError for what is not laid as `Laid` and the kinds of the towers say."""
    say = f"sample {sample.id!r}: its family's `lay` gives"
    if laid.keys() != kinds.keys():
        raise UserError(f"{say} towers {sorted(laid)} but the model's are {sorted(kinds)}; lay these")
    for name, kind in kinds.items():
        for is_right, received, expected in _laid_facts(sample, laid[name], kind):
            if not is_right:
                raise UserError(f"{say} tower {name!r} {received} but must give {expected}")


def _laid_facts(sample: Sample, laid: Laid, kind: TowerKind) -> Iterator[tuple[bool, str, str]]:
    """(whether it is so, what is there, what must be), in an order in which a fact relies on those before it."""
    items_I = _tensor_of(laid.items)
    least = int(items_I.min()) if laid.items else 1
    yield least > 0, f"an item of {least} units", "items of at least 1"
    units, T = int(items_I.sum()), sample.tokens_T.numel()
    shapes = [list(x.shape) for x in laid.inputs]
    odd = next((x for x in shapes if x[1:] != [kind.values]), None)
    yield odd is None, f"inputs of shape {odd}", f"shape [., {kind.values}]"
    is_bytes = any(medium.levels for medium in sample.media(*kind.media))
    dtype = next((x.dtype for x in laid.inputs if x.is_floating_point() == is_bytes), None)
    yield dtype is None, f"inputs of {dtype}", "torch.uint8 of media with levels, floats of others"
    of = f"for its items of {units} units"
    num, most = sum(x[0] for x in shapes), units * kind.inputs
    yield num == most, f"{num} inputs", f"{most} {of}"
    most = num_units(sample, kind)
    yield units == most, f"{units} units", f"{most}, those of its media, by which batches are sized"
    rows, features = units * kind.rows, units * kind.features
    coords, index = _kind_of(laid.coords_P4), _kind_of(laid.index_T)
    yield coords == (torch.int32, [rows, 4]), "coords_P4 of {}, {}".format(*coords), f"torch.int32, {[rows, 4]} {of}"
    yield index == (torch.int64, [T]), "index_T of {}, {}".format(*index), f"torch.int64, {[T]} for its tokens"
    low, high = (int(x) for x in laid.index_T.aminmax()) if T else (-1, -1)
    yield low >= -1 and high < features, f"index_T from {low} to {high}", f"-1 to {features - 1} {of}"
    num, most = len(laid.segments), len(kind.segments_per_unit)
    yield num == most, f"{num} lists of segments", f"{most}, as its kind says"
    for k, per_unit in enumerate(kind.segments_per_unit):
        lengths_N, here = _tensor_of(laid.segments[k]), f"segments[{k}]"
        num, most = lengths_N.numel(), units * per_unit
        least = int(lengths_N.min()) if num else 1
        yield least > 0, f"{here} with one of {least} rows", "segments of at least 1"
        yield num <= most, f"{here} with {num} segments", f"at most {most} {of}"
        num = int(lengths_N.sum())
        yield num == rows, f"{here} of {num} rows in all", f"{rows} {of}"
        is_inside_P = torch.ones(rows + 1, dtype=torch.bool).index_fill_(0, lengths_N.cumsum(0), False)
        crossed_I = is_inside_P[items_I.cumsum(0) * kind.rows]
        item = int(crossed_I.byte().argmax()) if units else 0
        yield not crossed_I.any(), f"{here} with one that crosses the end of item {item}", "segments within items"


def _kind_of(x: Tensor) -> tuple[torch.dtype, list[int]]:
    return x.dtype, list(x.shape)


def _tensor_of(lengths: Sequence[int]) -> Tensor:
    """int64; ten times as fast as `torch.tensor` of thousands of numbers."""
    return torch.frombuffer(array("q", lengths), dtype=torch.int64) if lengths else EMPTY
