"""The conformance matrix, family x mechanism x layout x compilation: every cell gives the step of one device.

See `conformance.py` for what is compared and `tests.tiny` for the families. Another transform is one more line, another
family joins all of them. `make test` runs two or three cells of every line, `make test-full` all of them.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch

from mmfn import models, tree
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.program import Transform
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.transforms.precision import precision
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.weights.sharding import local
from tests.parallel.conformance import BATCHES, Cell, check_cell, prepared
from tests.tiny import TINY, family_of

TWO, THREE, FOUR, EIGHT = (Layout(dp=n) for n in (2, 3, 4, 8))  # no width of the models is a multiple of 3
DDP, HSDP, HSDP_8 = Layout(replicate=2), Layout(replicate=2, dp=2), Layout(replicate=2, dp=4)
ALL = (TWO, THREE, FOUR, EIGHT, DDP, HSDP, HSDP_8)
FAMILIES = tuple(name for name in TINY if name != "small")  # that one is for graphs alone
# torch's compiler reads `.grad` of non-leaf inputs and hides the warning by a means that "error" defeats
QUIET_DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
KEPT = ("attention", "matmul", "experts")

RELEASED = data_parallel(reshard_after_forward=True)


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
    line("uniform", remat("uniform", num_layers=2), data_parallel(), layouts=(TWO, HSDP), num_layers=5),
    line("uniform, no prefetch", data_parallel(prefetch=False), remat("uniform", num_layers=3), layouts=(THREE,)),
    line("uniform, kept", data_parallel(keep_gathered=True), remat("uniform", num_layers=2), layouts=(TWO,)),
    line("block", data_parallel(), remat("block", num_layers=1), layouts=(TWO, HSDP)),
    line(
        "by stack",
        remat("full", where="vision"),
        data_parallel(),
        remat("selective", save=KEPT, where="text"),
        layouts=(TWO, HSDP),
    ),
    line("offload", offload("activations"), data_parallel(), layouts=(Layout(), TWO, HSDP)),
    line("offload, remat", data_parallel(), offload("activations"), remat("full"), layouts=(THREE, HSDP), num_layers=4),
    line("offload, uniform", data_parallel(), remat("uniform"), offload("activations"), layouts=(TWO,), num_layers=4),
    line("offload, kept", data_parallel(keep_gathered=True), remat("full"), offload("activations"), layouts=(TWO,)),
    line("hosted", offload("parameters"), data_parallel(), layouts=(Layout(), THREE, HSDP)),
    line("hosted, remat", data_parallel(), remat("full"), offload("parameters"), layouts=(THREE, HSDP), num_layers=4),
    line(
        "hosted, asymmetric",
        *(data_parallel(), offload("parameters"), remat("selective", save=KEPT)),
        layouts=(TWO,),
        batches=list(BATCHES),
    ),
    line(
        "hosted, uniform",
        *(offload("parameters"), remat("uniform", num_layers=2), data_parallel(prefetch=False)),
        layouts=(Layout(), TWO),
        num_layers=5,
    ),
    line(
        "hosted, kept",
        *(offload("parameters"), data_parallel(keep_gathered=True), remat("full"), offload("activations")),
        layouts=(Layout(), TWO),
    ),
    line(
        "hosted, float32",
        *(offload("parameters"), data_parallel(), precision(compute=torch.float32)),
        layouts=(Layout(), TWO),
        dtype=torch.float32,
    ),
    line("released", RELEASED, layouts=(THREE, HSDP)),
    line("hosted, released", offload("parameters"), RELEASED, offload("activations"), layouts=(Layout(), TWO)),
    line("kept", data_parallel(keep_gathered=True), remat("full"), layouts=(TWO, HSDP)),
    line("wide sums", data_parallel(), precision(reduce=torch.float64), layouts=(TWO,)),
    line("float32", data_parallel(), precision(compute=torch.float32), layouts=(TWO,), dtype=torch.float32),
    line("dropout", data_parallel(), layouts=(THREE, HSDP), trained="lora with dropout"),
    line(
        "dropout, kept", data_parallel(keep_gathered=True), remat("full"), layouts=(TWO,), trained="lora with dropout"
    ),
    line(
        "dropout, float32",
        data_parallel(),
        precision(compute=torch.float32, rules={r".*/lora/.*/a": torch.float64}),
        remat("full"),
        layouts=(Layout(), TWO),
        dtype=torch.float32,
        trained="lora with dropout",
    ),
]


COMPILED: dict[str, tuple[tuple[Transform, ...], str]] = {  # transforms beside `compiled`, and what is trained
    "layer": ((), "all"),
    "layer, remat": ((remat("full"),), "lora"),
    "layer, selective": ((remat("selective", save=KEPT),), "second block"),
    "layer, offload": ((remat("full"), offload("activations")), "all"),
    "layer, hosted": ((offload("parameters"),), "decoder"),
    "layer, dropout": ((remat("full"),), "lora with dropout"),
    "step": ((), "all"),
    "step, remat": ((remat("full"),), "lora of all"),
    "step, dropout": ((), "lora with dropout"),
}
GRAPHS = [  # one device: virtual ranks cannot compile, real ones do in `test_ranks`
    line(name, *transforms, compiled(name.split(",")[0], backend="aot_eager"), layouts=(Layout(),), trained=trained)
    for name, (transforms, trained) in COMPILED.items()
]


def _matrix() -> Iterator[Any]:
    """All cells; of every line the first and others, which differ from line to line, are fast."""
    for i, cells in enumerate(LINES):
        fast = {0, (i + 1) % len(cells), (3 * i + 2) % len(cells)}
        for j, cell in enumerate(cells):
            yield pytest.param(cell, id=str(cell), marks=() if j in fast else pytest.mark.slow)


def _graphs() -> Iterator[Any]:
    """A graph takes seconds to make: of each kind one cell is fast."""
    for cells in GRAPHS:
        for cell in cells:
            is_fast = cell.name in ("layer", "step") and cell.family == "toy"
            yield pytest.param(cell, id=str(cell), marks=() if is_fast else pytest.mark.slow)


@pytest.mark.parametrize("cell", list(_matrix()))
def test_cell(cell: Cell) -> None:
    check_cell(cell)


@QUIET_DYNAMO
@pytest.mark.parametrize("cell", list(_graphs()))
def test_compiled_cell(cell: Cell) -> None:
    check_cell(cell)


def test_every_family_is_there() -> None:
    """A family of `models.FAMILIES` has a tiny model, and a tiny model has a column."""
    assert {family_of(name).name for name in TINY} == {*models.FAMILIES, "toy"}
    columns = {(name, cell.family) for cells in (*LINES, *GRAPHS) for cell in cells for name in [cell.name]}
    for cells in (*LINES, *GRAPHS):
        assert {family for name, family in columns if name == cells[0].name} == set(FAMILIES), cells[0].name


def test_the_same_step_twice_is_bitwise_equal() -> None:
    cell = Cell(layout=HSDP, name="twice", transforms=(data_parallel(), remat("full")))
    first, second = check_cell(cell).results[0], check_cell(cell).results[0]
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_a_state_that_is_not_donated_is_left_as_it_was() -> None:
    cell = Cell(layout=THREE, name="kept state", transforms=(data_parallel(),))

    def run(mesh: Mesh) -> None:
        step, state, batch = prepared(cell, mesh, donate=False)
        before = [local(leaf).clone() for leaf in tree.leaves((state, batch))]
        after, _ = step(state, [batch])
        assert all(torch.equal(local(x), y) for x, y in zip(tree.leaves((state, batch)), before, strict=True))
        for new, old in zip(tree.leaves(after["params"]), tree.leaves(state["params"]), strict=True):
            assert new.placements == old.placements
            assert new.to_local().numel() == 0 or not torch.equal(new.to_local(), old.to_local())

    virtual(cell.layout, run)
