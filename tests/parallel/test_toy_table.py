"""Kernels of other names in the table: every transform runs them, remat keeps what they declare, plans count them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from mmfn.ops.kernel import Kernel, wrapping
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.program import Program, Transform, pipe
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.transforms.vocabulary_parallel import vocabulary_parallel
from mmfn.train.planning import step_trace
from tests.parallel import toy_table
from tests.parallel.conformance import Cell, check_cell, check_outcome, outcome, spread
from tests.parallel.plan_cases import make
from tests.parallel.toy_table import bare, toy

ONE, BLOCKS, TEXT = Layout(), 4, 2  # blocks of the tiny model
KEEP = remat("selective", save=("attention", "experts"))


def cell(layout: Layout, *transforms: Transform, **fields: Any) -> Cell:
    fields = {"name": "toy table", "family": "moe", **fields}
    return Cell(layout=layout, transforms=(toy, *transforms), **fields)


CELLS = {
    "plain": cell(ONE),
    "compiled": cell(ONE, compiled("layer", backend="aot_eager")),
    "compiled, remat": cell(ONE, KEEP, compiled("layer", backend="aot_eager")),
    "uniform": cell(ONE, remat("uniform", num_layers=2)),
    "offload": cell(ONE, offload("activations"), remat("full")),
    "dp, sharded head": cell(Layout(dp=2), data_parallel(), vocabulary_parallel()),
    "hsdp": cell(Layout(replicate=2, dp=2), data_parallel(), KEEP),
    "ulysses": cell(Layout(cp=2, ulysses=2), spread("ulysses"), data_parallel(), KEEP),
    "ring": cell(Layout(cp=2), KEEP, spread("ring"), data_parallel(), pack={"segment_multiple": 4}),
    "gather": cell(Layout(cp=2), spread("gather"), data_parallel(), KEEP),
    "dropless": cell(Layout(dp=2, ep=2), expert_parallel(), data_parallel(), KEEP),
    "capacity": cell(Layout(dp=2, ep=2), KEEP, expert_parallel("capacity"), data_parallel(), pack={"tokens": 192}),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's compiler itself
@pytest.mark.parametrize("name", CELLS)
def test_every_transform_runs_it(name: str) -> None:
    toy_table.calls.clear()
    check_cell(CELLS[name])
    assert toy_table.calls["attention"] > 0 < toy_table.calls["product"]


@pytest.mark.parametrize(
    ("kind", "save", "attention", "products"),
    [
        ("none", (), BLOCKS, 2 * TEXT),
        ("full", (), 2 * BLOCKS, 4 * TEXT),
        ("selective", ("attention",), BLOCKS, 4 * TEXT),
        ("selective", ("experts",), 2 * BLOCKS, 2 * TEXT),
        ("selective", ("attention", "experts"), BLOCKS, 2 * TEXT),
    ],
)
def test_remat_keeps_what_is_declared(kind: str, save: tuple[str, ...], attention: int, products: int) -> None:
    found_cell = cell(ONE, remat(kind, save=save))
    toy_table.calls.clear()
    check_outcome(found_cell, outcome(found_cell, single_mesh()))
    gradients = 2 * TEXT  # `product` runs for the gradients of rows as well
    assert toy_table.calls["attention"] == attention
    assert products - TEXT * (kind == "full" or save == ("attention",)) <= toy_table.calls["product"] - gradients
    assert toy_table.calls["product"] - gradients <= products


@pytest.mark.parametrize("is_first", [True, False])
def test_remat_keeps_blocks_of_attention_whichever_transform_comes_first(is_first: bool) -> None:
    found = {}
    for name, policy in (("none", ()), ("kept", (remat("selective", save=("attention",)),))):
        transforms = (*policy, spread("ring")) if is_first else (spread("ring"), *policy)
        toy_table.calls.clear()
        check_cell(cell(Layout(cp=2), *transforms, data_parallel(), pack={"segment_multiple": 4}))
        found[name] = toy_table.calls["attention"]
    assert found["kept"] == found["none"]


@pytest.mark.parametrize("name", ["attention", "experts"])
def test_what_nobody_declared_is_refused_by_remat(name: str) -> None:
    message = rf"ops.{name} is a function without a declaration, .*; put Kernel\(fn\) into the table if it runs torch's"
    with pytest.raises(ValueError, match=message):
        pipe(Program.of(None, bare(name)), remat("selective", save=(name,)))
    with pytest.raises(
        ValueError, match=r"remat cannot save 'swiglu': the table's op declares no results .* attention,"
    ):
        pipe(Program.of(None, toy_table.table()), remat("selective", save=("swiglu",)))


def traced(change: Callable[[Program], Program], *transforms: Transform) -> Any:
    """What a plan finds of a step whose program is changed first."""
    setup, layout = make(moe=True, side=0)

    def build(cfg: Any, mesh: Mesh) -> Program:
        return pipe(Program.of(setup.family.specs(cfg), mesh=mesh), change, *transforms)

    return step_trace.trace_step(replace(setup, build=build), layout, TEXT)


@pytest.mark.parametrize("transforms", [(), (KEEP,)], ids=["plain", "selective remat"])
def test_a_plan_counts_what_is_declared(transforms: tuple[Transform, ...]) -> None:
    """64 tokens without an image, each with two experts."""
    flops = traced(toy, *transforms).flops
    assert flops["forward", "attention"] == 10**6 * TEXT * 64
    assert flops["forward", "experts"] == 10**9 * TEXT * 2 * 64 * 2
    assert flops["backward", "experts"] == 10**9 * TEXT * 2 * 64 * 2
    assert flops["backward", "attention"] == 0


@pytest.mark.parametrize("name", ["attention", "experts"])
def test_what_nobody_declared_is_refused_by_a_plan(name: str) -> None:
    with pytest.raises(ValueError, match=f"ops.{name} is a function without a declaration"):
        traced(lambda program: replace(program, ops=bare(name)))


def test_an_operator_nobody_declared_is_refused_by_a_plan() -> None:
    ops = replace(toy_table.table(), experts=Kernel(toy_table.experts))
    with pytest.raises(ValueError, match="no op of the table declares the operator toy::product, so its FLOPs are"):
        traced(lambda program: replace(program, ops=ops))


def test_what_wraps_an_op_declares_what_the_op_does() -> None:
    table = toy_table.table()
    whole = wrapping(lambda: None, table.attention, table.experts, operators={"toy::exchange": None})
    assert isinstance(whole, Kernel)
    assert set(whole.operators) == {*table.attention.operators, *table.experts.operators, "toy::exchange"}
    assert whole.results == ("toy::attention", "toy::product")
    assert not isinstance(wrapping(lambda: None, table.attention, lambda: None), Kernel)


def test_torch_counts_operators_of_this_package() -> None:
    """By its own counter, on the eager step: the same as a plan."""
    with FlopCounterMode(display=False) as counter:
        outcome(Cell(layout=ONE, name="counted", transforms=(), family="moe"), single_mesh())
    counts = {str(packet): n for packet, n in counter.get_flop_counts()["Global"].items()}
    assert counts["mmfn.attention_grad"] * 2 == counts["mmfn.attention"] * 5 > 0
    assert counts["mmfn.grouped_linear_grad"] * 2 == counts["mmfn.grouped_linear"] > 0  # rows, and gradients of rows
    assert counts["mmfn.linear_cross_entropy"] > 0
