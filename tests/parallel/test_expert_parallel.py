"""Expert parallelism: routed rows exchanged between ranks give what one device computes with all experts."""

import math
from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mmfn import ops as tables
from mmfn.ops.experts import experts_reference
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import World, run_virtual
from mmfn.parallel.program import Program, Transform, lower, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import dropless, expert_parallel, fixed, kept_rows
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.weights.sharding import shard_params
from mmfn.spec import ZEROS, spec
from mmfn.tree import Tree
from tests.parallel import expert_cases
from tests.parallel.conformance import Cell, check_cell
from tests.parallel.expert_cases import NAMES, Case, Reads, build, on_mesh
from tests.parallel.ranks import run_ranks

E, D, F = 8, 5, 3
SPECS = {
    "gate_up": spec((E, 2 * F, D), "experts mlp embed", ZEROS),
    "down": spec((E, D, F), "experts embed mlp", ZEROS),
}
EP2, EP4, EP8 = Layout(dp=2, ep=2), Layout(dp=4, ep=4), Layout(dp=8, ep=8)
EDP2_EP2, HSDP_EP2 = Layout(dp=4, ep=2), Layout(replicate=2, dp=2, ep=2)
LAYOUTS = (EP2, EP4, EP8, EDP2_EP2, HSDP_EP2, Layout(replicate=2, dp=4, ep=2))
SLOW = pytest.mark.slow
KEPT = remat("selective", save=("attention", "exchange"))
CAPACITY = {"tokens": 192}  # of a batch of the conformance matrix: this form needs as many on every rank


def cell(layout: Layout, kind: str, *others: Any, **fields: Any) -> Cell:
    given = {"name": kind, "pack": CAPACITY if kind == "capacity" else {}}
    transforms = (*others, expert_parallel(kind), data_parallel())
    return Cell(layout=layout, transforms=transforms, family="moe", **(given | fields))


STEPS = [
    *(cell(layout, "dropless") for layout in (EP2, EP4, EP8, EDP2_EP2)),
    *(cell(layout, "capacity") for layout in (EP2, EDP2_EP2)),
    cell(HSDP_EP2, "dropless", batch="first half unsupervised"),
    cell(EP4, "dropless", batch="first half without images"),
    cell(EDP2_EP2, "dropless", remat("full"), name="dropless, remat"),
    cell(EDP2_EP2, "dropless", remat("selective", save=("exchange",)), name="dropless, exchange kept"),
    cell(HSDP_EP2, "dropless", KEPT, name="dropless, attention and exchange kept", batch="first half without images"),
    cell(EP2, "capacity", remat("selective", save=("experts", "exchange")), name="capacity, exchange kept"),
]


@pytest.mark.parametrize("cell", STEPS, ids=str)
def test_a_step_of_a_model(cell: Cell) -> None:
    """Loss, auxiliary loss, norm, gradients and updated parameters, by the same collectives on every rank."""
    world = check_cell(cell)
    assert world.results[0]["metrics/dropped"] == 0
    assert world.results[0]["metrics/aux_loss"] > 1


def weights() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(s.shape, generator=g, dtype=torch.float64) for name, s in SPECS.items()}


def run_op(layout: Layout, transform: Any, counts_E: list[Tensor], x_RD: list[Tensor], dy_RD: list[Tensor]) -> World:
    """`(y_RD, dx_RD, weight gradients)` of every rank, which computes with its experts alone."""

    def fn(mesh: Mesh) -> tuple[Tensor, Tensor, Tree]:
        rank, ep = mesh["world"].index, mesh["ep"]
        own = {name: leaf.chunk(ep.size)[ep.index].clone().requires_grad_() for name, leaf in weights().items()}
        leaf_RD = x_RD[rank].clone().requires_grad_()
        program = pipe(Program.of(SPECS, mesh=mesh), transform)
        y_RD = program.ops.experts(leaf_RD, counts_E[rank], own)
        dx_RD, *dw = torch.autograd.grad(y_RD, [leaf_RD, *own.values()], dy_RD[rank])
        return y_RD.detach(), dx_RD, dict(zip(own, dw, strict=True))

    return run_virtual(layout, fn)


def rows_of(counts_E: list[Tensor], extra: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Rows and gradients of outputs; behind the last expert's rows lie `extra` that hold no number."""
    g = torch.Generator().manual_seed(1)
    x_RD, dy_RD = [], []
    for counts, more in zip(counts_E, extra, strict=True):
        rows = torch.randn(2, int(counts.sum()) + more, D, generator=g, dtype=torch.float64)
        rows[0, int(counts.sum()) :] = torch.nan
        x_RD.append(rows[0])
        dy_RD.append(rows[1])
    return x_RD, dy_RD


def check_op(
    world: World, ep: int, counts_E: list[Tensor], kept: list[Tensor], x_RD: list[Tensor], dy_RD: list[Tensor]
):
    """Against the reference on one device, for the rows that are kept; others are as if they were not there."""
    total = {name: torch.zeros_like(leaf) for name, leaf in weights().items()}
    for rank, (y_RD, dx_RD, dw) in enumerate(world.results):
        experts_R = torch.arange(E).repeat_interleave(counts_E[rank])
        place_R = torch.cat([torch.arange(n) for n in counts_E[rank].tolist()])
        is_kept_R = torch.zeros(len(y_RD), dtype=torch.bool)
        is_kept_R[: len(experts_R)] = place_R < kept[rank][experts_R]
        leaves = {name: leaf.requires_grad_() for name, leaf in weights().items()}
        leaf_RD = x_RD[rank][is_kept_R].requires_grad_()
        want_RD = experts_reference(leaf_RD, kept[rank], leaves)
        want_dx, *want_dw = torch.autograd.grad(want_RD, [leaf_RD, *leaves.values()], dy_RD[rank][is_kept_R])
        torch.testing.assert_close(y_RD[is_kept_R], want_RD.detach(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(dx_RD[is_kept_R], want_dx, rtol=1e-11, atol=1e-11)
        assert (y_RD[~is_kept_R] == 0).all()
        assert (dx_RD[~is_kept_R] == 0).all()
        for (name, leaf), want in zip(total.items(), want_dw, strict=True):
            leaf -= want  # the ranks' gradients together, less those of one device
            leaf.chunk(ep)[rank % ep].add_(dw[name])
    for left in total.values():
        torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-11)


def draw_counts(world: int, ep: int) -> list[Tensor]:
    """Uneven counts: rank 0 has no row, the last only rows for one rank, and no rank has any for expert 2."""
    g = torch.Generator().manual_seed(2)
    counts = [torch.randint(0, 7, (E,), generator=g) for _ in range(world)]
    counts[0][:] = 0
    counts[-1][E // ep :] = 0
    for count in counts:
        count[2] = 0
    return counts


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_op_for_any_counts(layout: Layout) -> None:
    """Also with rows behind the last expert's, which hold no number; ranks may have any number of rows."""
    counts_E = draw_counts(layout.world, layout.ep)
    x_RD, dy_RD = rows_of(counts_E, [rank % 3 for rank in range(layout.world)])
    world = run_op(layout, expert_parallel(), counts_E, x_RD, dy_RD)
    check_op(world, layout.ep, counts_E, counts_E, x_RD, dy_RD)


@pytest.mark.parametrize("factor", [None, 1.4, 1, 0.3, 0.01])
@pytest.mark.parametrize("layout", [EP2, EP4, EDP2_EP2], ids=str)
def test_the_op_with_a_capacity(layout: Layout, factor: float | None) -> None:
    counts_E = draw_counts(layout.world, layout.ep)
    R = max(int(counts.sum()) for counts in counts_E) + 2
    x_RD, dy_RD = rows_of(counts_E, [R - int(counts.sum()) for counts in counts_E])
    kept = [kept_by_hand(counts, ceil((factor or layout.ep) * R / layout.ep), layout.ep) for counts in counts_E]
    if factor is None or factor < 1:  # nothing is dropped, and something is
        assert all(map(torch.equal, kept, counts_E)) == (factor is None)
    world = run_op(layout, expert_parallel("capacity", capacity=factor), counts_E, x_RD, dy_RD)
    check_op(world, layout.ep, counts_E, kept, x_RD, dy_RD)
    assert len({tuple(calls) for calls in world.calls}) == 1  # shapes included: they are static


def kept_by_hand(counts_E: Tensor, room: int, ep: int) -> Tensor:
    """Of each rank's rows in order of experts, `room` of them evenly spaced if there are more."""
    kept = []
    for counts in counts_E.view(ep, -1).tolist():
        total, seen, left = sum(counts), 0, []
        for count in counts:
            places = range(seen, seen + count)
            left.append(sum((i + 1) * room // total > i * room // total for i in places) if total > room else count)
            seen += count
        kept += left
    return torch.tensor(kept)


def test_what_a_capacity_keeps() -> None:
    """Never more than there is or there is room for, all of the room if needed, in proportion for every expert."""
    g = torch.Generator().manual_seed(3)
    for _ in range(50):
        counts_E = torch.randint(0, 30, (12,), generator=g)
        R, factor = int(counts_E.sum()) + 5, float(torch.rand((), generator=g)) * 2
        room = min(ceil(factor * R / 3), R)
        kept_E = kept_rows(counts_E, R, num_ranks=3, factor=factor)
        totals_W = counts_E.view(3, 4).sum(1)
        assert torch.equal(kept_E.view(3, 4).sum(1), totals_W.clamp(max=room))
        assert (kept_E <= counts_E).all()
        share_E = (room / totals_W.clamp(min=room)).repeat_interleave(4)
        assert ((kept_E - share_E * counts_E).abs() < 1).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [EP2, EP4, EDP2_EP2, HSDP_EP2], ids=str)
@pytest.mark.parametrize("kind", ["dropless", "dropless, exchange kept", "capacity", "capacity, exchange kept"])
def test_routings(name: str, layout: Layout, kind: str) -> None:
    case = Case.of(layout.world, name, is_even="capacity" in kind)
    world = run_virtual(layout, lambda mesh: on_mesh(build(mesh, *expert_cases.EAGER[kind]), case))
    expert_cases.check(case, world.results)
    assert len({tuple((c.axis, c.name, c.site) for c in calls) for calls in world.calls}) == 1
    counts_E = world.results[0]["counts_E"]
    assert counts_E.sum() == sum(case.valid) * 2 * 2, "two layers send two rows of every token"
    assert all(counts_E[list(case.disliked)] == 0)
    assert not case.liked or counts_E[list(case.liked)].sum() == counts_E.sum()


@pytest.mark.parametrize(("valid", "dropped"), [((12, 12), 2 * (6 + 6)), ((6, 11), 2 * (0 + 4)), ((6, 9), 0)])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_dropped_rows_are_counted(valid: tuple[int, int], dropped: int, is_mixed: bool) -> None:
    """In two layers each, of two ranks, with room for 18 rows: what tokens lose, wherever padding lies.

    All tokens go to the last rank, with two rows each: rank 1 with 11 tokens loses 4 of 22 rows, with 9 none.
    """
    case = replace(Case.of(2, "all rows to the last rank", is_even=True), valid=valid, is_mixed=is_mixed)
    transforms = (data_parallel(), expert_parallel("capacity", capacity=1.5))
    for found in run_virtual(EP2, lambda mesh: on_mesh(build(mesh, *transforms), case)).results:
        assert found["dropped"] == dropped


@pytest.mark.parametrize("kind", ["dropless", "dropless, remat", "capacity"])
@pytest.mark.parametrize("layout", [EP2, EDP2_EP2], ids=str)
def test_padding_between_tokens(layout: Layout, kind: str) -> None:
    """As where segments are padded: the same as behind them, and rows of padding are not sent."""
    case = replace(Case.of(layout.world, "uneven", is_even=kind == "capacity"), is_mixed=True)
    world = run_virtual(layout, lambda mesh: on_mesh(build(mesh, *expert_cases.EAGER[kind]), case))
    expert_cases.check(case, world.results)
    for calls, valid in zip(world.calls, case.valid, strict=True):
        first = next(call for call in calls if call.site == "experts")
        assert kind == "capacity" or first.shape[0] == 2 * valid < 2 * case.tokens[0] + 2 * valid


@pytest.mark.parametrize("kind", ["dropless", "capacity"])
@pytest.mark.parametrize("is_repeated", [False, True], ids=["constant router", "repeated rows"])
def test_ties_are_broken_alike_on_every_layout(kind: str, is_repeated: bool) -> None:
    case = replace(Case.of(2, "uneven", is_even=True), tie="rows" if is_repeated else "router")
    world = run_virtual(EP2, lambda mesh: on_mesh(build(mesh, *expert_cases.EAGER[kind]), case))
    expert_cases.check(case, world.results)
    num_rows = sum(case.valid) * 2
    assert is_repeated or world.results[0]["counts_E"].tolist() == [num_rows, num_rows, *[0] * 6]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    reads = Reads()

    def watch(name: str) -> None:
        method = getattr(Tensor, name)

        def called(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if reads.is_on:
                reads.seen.append(name)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, called)

    for name in ("tolist", "item", "__int__", "__index__", "__bool__", "__float__", "cpu", "numpy", "nonzero"):
        watch(name)
    return reads


def experts_without_reads(x_RD: Tensor, counts_E: Tensor, weights: Tree) -> Tensor:
    """All experts for all rows, and of each row the result of its own."""
    owner_R = torch.searchsorted(counts_E.cumsum(0), torch.arange(len(x_RD)), right=True)
    gate_ERF, up_ERF = (x_RD @ weights["gate_up"].transpose(1, 2)).chunk(2, -1)
    y_ERD = (torch.nn.functional.silu(gate_ERF) * up_ERF) @ weights["down"].transpose(1, 2)
    is_own_ER = owner_R == torch.arange(len(counts_E))[:, None]
    return (y_ERD * is_own_ER[..., None]).sum(0)


@pytest.mark.parametrize(("kind", "expected"), [("dropless", ["tolist"]), ("capacity", [])])
@pytest.mark.parametrize("again", [0, 1])
def test_what_a_layer_costs(kind: str, expected: list[str], again: int, reads: Reads) -> None:
    """Host reads and collectives of a layer, without and with recomputation, are those `expert_parallel` tells of."""
    case, layers, forwards = Case.of(2, "uneven", is_even=True), len(expert_cases.SPECS), 1 + again
    table = replace(tables.portable(), experts=experts_without_reads)
    transforms = (*[remat("full")] * again, expert_parallel(kind), data_parallel())

    def fn(mesh: Mesh) -> list[str]:
        program = lower(pipe(Program.of(expert_cases.SPECS, table, mesh), *transforms))
        params = shard_params(case.params(), expert_cases.SPECS, mesh)
        inputs = case.inputs(mesh["world"].index)
        with reads as seen:
            expert_cases.run(program, params, inputs)
        return seen

    world = run_virtual(EP2, fn)
    assert world.results == [expected * layers * forwards] * 2
    for calls in world.calls:
        exchanges = [call.site for call in calls if (call.axis, call.name) == ("ep", "all_to_all")]
        assert len(exchanges) == sum(call.axis == "ep" for call in calls)
        assert exchanges.count("expert counts") == layers * forwards
        assert exchanges.count("experts") == layers * (2 * forwards + 2)


def test_balanced_rows_need_no_read(reads: Reads) -> None:
    counts_E = [torch.full((E,), 3)] * 4
    x_RD, dy_RD = rows_of(counts_E, [0] * 4)
    world = run_op(EP4, expert_parallel(balanced=True), counts_E, x_RD, dy_RD)
    check_op(world, 4, counts_E, counts_E, x_RD, dy_RD)

    def fn(mesh: Mesh) -> list[str]:
        own = {name: leaf.chunk(4)[mesh["ep"].index] for name, leaf in weights().items()}
        with reads as seen:
            dropless(x_RD[0], counts_E[0], own, base=experts_without_reads, axis=mesh["ep"], balanced=True)
        return seen

    assert run_virtual(EP4, fn).results == [[]] * 4


def test_unbalanced_rows_raise_where_balanced_ones_are_assumed() -> None:
    counts_E = [torch.tensor([4, 2, 3, 3, 3, 3, 3, 3])] * 2
    x_RD, dy_RD = rows_of(counts_E, [0, 0])
    run_op(EP2, expert_parallel(balanced=True), counts_E, x_RD, dy_RD)  # 12 rows to each rank: even enough
    counts_E = [torch.tensor([4, 3, 3, 3, 2, 3, 3, 3])] * 2
    with pytest.raises(RuntimeError, match="got rows that are not spread evenly; use balanced=False"):
        run_op(EP2, expert_parallel(balanced=True), counts_E, x_RD, dy_RD)
    counts_E = [torch.tensor([4, 3, 3, 3, 2, 3, 3, 2])] * 2
    x_RD, dy_RD = rows_of(counts_E, [0, 0])
    with pytest.raises(ValueError, match="23 routed rows are not divisible by ep 2"):
        run_op(EP2, expert_parallel(balanced=True), counts_E, x_RD, dy_RD)


class Silent:
    """A transport that moves nothing."""

    def all_to_all(self, x: Tensor, out_sizes: list[int], in_sizes: list[int], site: str) -> Tensor:
        assert sum(in_sizes) == x.shape[0]
        return x.new_empty(sum(out_sizes), *x.shape[1:])

    def wait(self, x: Tensor) -> Tensor:
        return x


def test_shapes_alone() -> None:
    """A plan has no values: counts cannot be read, so rows are taken to be balanced or to fill a capacity."""
    axis = Axis(name="ep", size=4, index=1, transport=Silent())
    with FakeTensorMode():
        x_RD = torch.empty(24, D, dtype=torch.float64, requires_grad=True)
        own = {name: torch.empty(2, *s.shape[1:], dtype=torch.float64) for name, s in SPECS.items()}
        counts_E = torch.empty(E, dtype=torch.int64)
        with pytest.raises(DataDependentOutputException):
            dropless(x_RD, counts_E, own, base=tables.portable().experts, axis=axis)
        y_RD = dropless(x_RD, counts_E, own, base=tables.portable().experts, axis=axis, balanced=True)
        assert torch.autograd.grad(y_RD.sum(), x_RD)[0].shape == y_RD.shape == (24, D)
        y_RD = fixed(x_RD, counts_E, own, base=tables.portable().experts, axis=axis, factor=1.3)
        assert torch.autograd.grad(y_RD.sum(), x_RD)[0].shape == y_RD.shape == (24, D)


def notes(layout: Layout, *transforms: Transform) -> tuple[str, ...]:
    noted: tuple[str, ...] = (
        run_virtual(layout, lambda mesh: pipe(Program.of(SPECS, mesh=mesh), *transforms)).results[0].notes
    )
    return noted


def test_notes() -> None:
    assert notes(EP2, expert_parallel()) == ("expert_parallel('dropless'): 8 experts, 4 on each of 2 ranks",)
    assert notes(EP4, expert_parallel(balanced=True))[0].endswith(
        "2 on each of 4 ranks, rows taken to be spread evenly"
    )
    assert notes(EP4, expert_parallel("capacity", capacity=1.5))[0].endswith(
        "room for 1.5 times the even share of rows, what is beyond it is dropped"
    )
    for capacity in (None, 4, 7.5):
        note = notes(EP4, expert_parallel("capacity", capacity=capacity))[0]
        assert note.endswith("room for 4 times the even share of rows, nothing is dropped")


def test_one_rank_is_the_identity() -> None:
    program = Program.of(None)  # not even experts are asked for
    assert expert_parallel()(program) is program
    assert expert_parallel("capacity")(program) is program
    assert notes(Layout(dp=2), expert_parallel()) == ()


def test_settings_that_are_refused() -> None:
    with pytest.raises(ValueError, match="expert kind 'drop' is unknown; use one of dropless, capacity"):
        expert_parallel("drop")
    with pytest.raises(ValueError, match=r"capacity is 1.5 but kind 'dropless' has none; leave it out or use kind"):
        expert_parallel(capacity=1.5)
    with pytest.raises(ValueError, match="balanced has no effect with kind 'capacity'"):
        expert_parallel("capacity", balanced=True)
    for capacity in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"capacity is {capacity} but must be positive"):
            expert_parallel("capacity", capacity=capacity)


def test_layouts_that_are_refused() -> None:
    def transform(layout: Layout, specs: Tree) -> None:
        run_virtual(layout, lambda mesh: expert_parallel()(Program.of(specs, mesh=mesh)))

    with pytest.raises(ValueError, match="ep 3 must divide the 8 experts of down; use one of 1, 2, 4, 8"):
        transform(Layout(dp=3, ep=3), SPECS)
    with pytest.raises(ValueError, match="dp 2, ep 2: ep is 2 but the model has no experts; set ep to 1"):
        transform(EP2, {"weight": spec((4, 4), "embed mlp", ZEROS)})
    with pytest.raises(ValueError, match=r"no transform takes care of ep; add expert_parallel\(\)"):
        run_virtual(EP2, lambda mesh: build(mesh, data_parallel()))


@pytest.mark.dist
def test_four_real_ranks() -> None:
    case = Case.of(4, "an expert without rows", is_even=True)
    results = run_ranks(4, expert_cases.on_real_ranks, EDP2_EP2, case)
    for name in expert_cases.EAGER:
        expert_cases.check(case, [found[name] for found in results])


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("dropless, exchange kept", "aot_eager"),
        *(
            pytest.param(name, "aot_eager", marks=SLOW)
            for name in ("dropless", "dropless, remat", "capacity", "capacity, exchange kept")
        ),
        *(pytest.param(f"{kind}, exchange kept", "inductor", marks=SLOW) for kind in ("dropless", "capacity")),
    ],
)
def test_compiled_on_two_real_ranks(name: str, backend: str) -> None:
    """One graph serves all layers and any routing, a rank to which no row goes included."""
    cases = [Case.of(2, routing, is_even=True) for routing in ("uneven", "all rows to the last rank", NAMES[3])]
    results = run_ranks(2, expert_cases.compiled_on_real_ranks, EP2, cases, name, backend)
    assert [num_graphs for num_graphs, _, _ in results] == [1, 1]
    for i, case in enumerate(cases):
        expert_cases.check(case, [eager[i] for _, _, eager in results])
        expert_cases.check(case, [compiled[i] for _, compiled, _ in results])


@pytest.mark.dist
def test_compiled_graphs_do_not_repeat_a_kept_exchange() -> None:
    """Three all-to-alls and the read of four sizes forward, two all-to-alls backward. A block that keeps nothing runs
    its forward graph again; of one that does, what is repeated is in its backward graph, which reads no size again."""
    case, read = Case.of(2, "uneven", is_even=True), expert_cases.READ
    names = ("dropless, remat", "dropless, exchange kept", "capacity, exchange kept")
    for found in run_ranks(2, expert_cases.exchanges_of_graphs, EP2, case, names):
        for name in names:
            forward, backward = found[name]
            assert forward == {expert_cases.ALL_TO_ALL: 3} | ({read: 4} if "dropless" in name else {})
            assert backward == {expert_cases.ALL_TO_ALL: 2}
