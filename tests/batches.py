"""Packing and changing batches in tests."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import mmfn
from mmfn.batch import Batch, Sample, to
from mmfn.packing import Sizes


def packed(
    model: mmfn.Model,
    samples: Sequence[Sample],
    *,
    tokens: int | None = None,
    segments: int | None = None,
    patches: int | None = None,
    units: int | None = None,
    segment_multiple: int = 1,
) -> Batch:
    """`Family.pack` with sizes as keywords; `patches`: room in the tower of a model that has one, `units`: in all."""
    towers = model.family.towers(model.cfg)
    room = {} if units is None else dict.fromkeys(towers, units)
    room |= {} if patches is None else {"vision": patches // towers["vision"].inputs}
    sizes = Sizes(tokens=tokens, segments=segments, units=room, segment_multiple=segment_multiple)
    return model.family.pack(samples, model.cfg, sizes)


def wide(batch: Batch) -> Batch:
    """The batch in float64: its weights and what encoders read."""
    cast = to(batch, "cpu", torch.float64)
    return replace(cast, weights_T=batch.weights_T.double())


def with_inputs(batch: Batch, fn: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with `fn` of what its encoders read."""
    towers = {name: replace(tower, inputs_UF=fn(tower.inputs_UF)) for name, tower in batch.towers.items()}
    return replace(batch, towers=towers)
