"""What ranks tell each other as plain values, over an axis on the CPU."""

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from mmfn.errors import UserError
from mmfn.parallel.mesh.axis import Axis

T = TypeVar("T")


def gather_values(value: Any, axis: Axis, site: str) -> list[Any]:
    """The values of all ranks, in their order. A value is anything JSON holds; tuples arrive as lists."""
    return [value] if axis.size == 1 else [json.loads(text) for text in _gather_texts(value, axis, site)]


def gather_to_first(value: Any, axis: Axis, site: str) -> list[Any]:
    """The values of all ranks, in their order, on the first of them; [] on the others, which make nothing of them."""
    if axis.size == 1:
        return [value]
    texts = _gather_texts(value, axis, site)
    return [json.loads(text) for text in texts] if axis.index == 0 else []


def wait_for_all(axis: Axis, site: str) -> None:
    """Return when every rank of the axis has come here."""
    axis.all_reduce(torch.zeros(1), site)


def on_all(work: Callable[[], T], axis: Axis, what: str, *, wraps_alone: bool = False) -> list[T]:
    """What `work` returns on every rank, anything JSON holds. Raises ValueError on all where it raises on one.

    `what`: what fails then, in the sentence that all of them get. The error of a rank alone is its own, unless
    `wraps_alone`.
    """
    if axis.size == 1 and not wraps_alone:
        return [work()]
    error: Exception | None = None
    found: dict[str, Any]
    try:
        found = {"value": work()}
    except Exception as caught:
        error, found = caught, {"error": _sentence(caught)}
    everyone = gather_values(found, axis, what)
    failed = [f"rank {rank}: {one['error']}" for rank, one in enumerate(everyone) if "error" in one]
    if failed:
        more = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise UserError(f"{what} failed on {failed[0]}{more}") from error
    return [one["value"] for one in everyone]


def _gather_texts(value: Any, axis: Axis, site: str) -> Iterator[bytes]:
    """The values of all ranks as JSON; when this returns the collectives are done."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = axis.all_gather(torch.tensor([text.numel()]), site).tolist()
    padded = torch.nn.functional.pad(text, (0, max(sizes) - text.numel()))
    rows = axis.all_gather(padded[None], site)
    return (row[:size].numpy().tobytes() for row, size in zip(rows, sizes, strict=True))


def _sentence(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f" ({error.filename})" if error.filename else "")
    return f"{type(error).__name__}: {error}"
