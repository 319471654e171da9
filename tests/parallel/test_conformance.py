"""The conformance matrix: every layout and transform gives the step of one device. See `conformance.py`.

Another transform is one more line. `make test` runs one cell of every line, the one marked by its place in the list,
and `make test-full` all of them.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch

from mmfn.parallel.data_parallel import data_parallel
from mmfn.parallel.mesh import Layout
from mmfn.parallel.precision import precision
from mmfn.parallel.program import Transform
from mmfn.parallel.remat import remat
from tests.parallel.conformance import BATCHES, Cell, check_cell

TWO, THREE, FOUR, EIGHT = (Layout(dp=n) for n in (2, 3, 4, 8))  # no width of the models is a multiple of 3
DDP, HSDP, HSDP_8 = Layout(replicate=2), Layout(replicate=2, dp=2), Layout(replicate=2, dp=4)
ALL = (TWO, THREE, FOUR, EIGHT, DDP, HSDP, HSDP_8)
FAMILIES = ("dense", "moe")
KEPT = ("attention", "matmul", "experts")


def line(
    name: str,
    *transforms: Transform,
    layouts: Sequence[Layout],
    families: Sequence[str] = FAMILIES,
    batches: Sequence[str] = ("mixed",),
    **settings: Any,
) -> list[Cell]:
    """The product of layouts, families and batches."""
    return [
        Cell(layout=layout, name=name, transforms=transforms, family=family, batch=batch, **settings)
        for batch, layout, family in product(batches, layouts, families)
    ]


LINES = [
    line("fsdp", data_parallel(), layouts=ALL),
    line("no prefetch", data_parallel(prefetch=False), layouts=(THREE, HSDP)),
    line("asymmetric", data_parallel(), layouts=(TWO, FOUR), batches=list(BATCHES)),
    line("asymmetric remat", data_parallel(), remat("full"), layouts=(TWO,), batches=list(BATCHES)),
    line("remat", remat("full"), data_parallel(), layouts=ALL),
    line("remat every 2", data_parallel(), remat("full", every=2), layouts=(THREE, HSDP)),
    line("selective", data_parallel(), remat("selective", save=KEPT), layouts=(TWO, HSDP)),
    line("selective every 2", remat("selective", save=("attention",), every=2), data_parallel(), layouts=(FOUR,)),
    line("kept", data_parallel(keep_gathered=True), remat("full"), layouts=(TWO, HSDP)),
    line("wide sums", data_parallel(), precision(reduce=torch.float64), layouts=(TWO,)),
    line("float32", data_parallel(), precision(compute=torch.float32), layouts=(TWO,), dtype=torch.float32),
]


def _matrix() -> Iterator[Any]:
    """All cells; the first of every line and, going on round, one more are fast."""
    for i, cells in enumerate(LINES):
        fast = {0, (i + 1) % len(cells)}
        for j, cell in enumerate(cells):
            yield pytest.param(cell, id=str(cell), marks=() if j in fast else pytest.mark.slow)


@pytest.mark.parametrize("cell", list(_matrix()))
def test_cell(cell: Cell) -> None:
    check_cell(cell)


def test_the_same_step_twice_is_bitwise_equal() -> None:
    cell = Cell(layout=HSDP, name="twice", transforms=(data_parallel(), remat("full")))
    first, second = check_cell(cell).results[0], check_cell(cell).results[0]
    assert all(torch.equal(x, second[name]) for name, x in first.items())
