"""What ranks tell each other as plain values, over an axis on the CPU."""

import json
from typing import Any

import torch

from mmfn.parallel.mesh.axis import Axis


def gather_values(value: Any, axis: Axis, site: str) -> list[Any]:
    """The values of all ranks, in their order. A value is anything JSON holds; tuples arrive as lists."""
    if axis.size == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = axis.all_gather(torch.tensor([text.numel()]), site).tolist()
    padded = torch.nn.functional.pad(text, (0, max(sizes) - text.numel()))
    rows = axis.all_gather(padded[None], site)
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]


def wait_for_all(axis: Axis, site: str) -> None:
    """Return when every rank of the axis has come here."""
    axis.all_reduce(torch.zeros(1), site)
