"""Steps on NPUs that are none, in a process of their own: `python -m tests.npu.on_npu LINE ...`. See `device.py`.

For every cell of the named lines of `cells.LINES` one line of JSON: what `OnHost` has seen of the step, or the error.
"""

import json
import sys
import traceback
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mmfn.ops.npu import npu
from mmfn.ops.npu.limits import LIMITS
from mmfn.parallel.mesh.layout import Mesh, make_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.program import Program
from tests.npu import stub
from tests.npu.cells import LINES
from tests.npu.device import OnHost
from tests.npu.table import join
from tests.parallel.conformance import Cell, check_outcome, one_device, prepared, values

ANY = replace(LIMITS, exchange_dtypes=LIMITS.dtypes, exchange_ranks=(("", (2, 4)),))
"""What operators that exchange rows take where nothing is exchanged over HCCL."""


def with_npu(program: Program) -> Program:
    """As a transform, which comes first."""
    join(program.mesh)
    return replace(program, ops=npu(limits=ANY, name_of=str))


def on_rank(cell: Cell, mesh: Mesh) -> tuple[dict[str, Tensor], OnHost]:
    """One step of a rank. Its backward runs on its own thread, not on the one that torch has for the device."""
    device = torch.device("npu", 0)

    def to(x: Tensor) -> Tensor:
        return x.to(device, torch.float32 if x.is_floating_point() else None)

    with torch.autograd.set_multithreading_enabled(False):
        with OnHost(device):
            step, state, batch = prepared(cell, mesh, to=to)
        with OnHost(device) as seen:
            state, metrics = step(state, [batch])
        with OnHost(device):
            return {name: x.cpu() for name, x in values(state, metrics, mesh).items()}, seen


def report(cell: Cell) -> dict[str, Any]:
    """What the first rank saw. Every value of every rank, gradients among them, is that of one device's step."""
    one_device(cell)
    cell = replace(
        cell,
        transforms=(with_npu, *cell.transforms),
        dtype=torch.float32 if cell.dtype == torch.float64 else cell.dtype,
    )
    with patch("mmfn.parallel.mesh.virtual.make_mesh", partial(make_mesh, device_type="npu")):
        ranks = virtual(cell.layout, partial(on_rank, cell))
    for found, _ in ranks:
        check_outcome(cell, found)
    seen = ranks[0][1]
    kernels = {name: sorted(map(str, reached)) for name, reached in seen.kernels.items()}
    return {"kernels": kernels, "missing": seen.missing, "reads": seen.reads}


def main(names: list[str]) -> None:
    """All cells of some lines."""
    stub.load()
    for cell in (cell for cells in LINES for cell in cells if cell.name in names):
        try:
            found = report(cell)
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps({"cell": str(cell), **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
