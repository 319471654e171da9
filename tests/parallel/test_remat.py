"""Recomputation: the same gradients, and which operators run again."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import run_virtual, virtual
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.remat import remat
from tests.parallel import expert_cases
from tests.parallel.conformance import Cell, check_cell, check_outcome, outcome, spread
from tests.parallel.expert_cases import Case
from tests.tiny import model_of

ATTENTION, GROUPED, MM, EMBED = "mmfn::attention", "mmfn::grouped_linear", "aten::mm", "aten::embedding"


class Count(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def counted(family: str, *transforms: Any) -> Counter[str]:
    """Operators of one step on one device, whose outcome is that of the step without transforms."""
    cell = Cell(layout=Layout(), name="remat", transforms=transforms, family=family)
    with Count() as count:
        found = outcome(cell, single_mesh())
    check_outcome(cell, found)
    return count.ran


TEXT, VISION = 2, 2  # blocks of the tiny model
BLOCKS = TEXT + VISION


@pytest.mark.parametrize(
    ("kind", "save", "every", "attention", "has_more_mm"),
    [
        ("full", (), 1, BLOCKS, True),
        ("full", (), 2, BLOCKS / 2, True),
        ("full", (), 3, 2, True),  # the first block of each stack
        ("selective", ("attention",), 1, 0, True),
        ("selective", ("attention", "matmul"), 1, 0, False),
        ("selective", ("matmul",), 2, BLOCKS / 2, False),
        ("none", (), 1, 0, False),
        ("uniform", (), 1, BLOCKS, True),
    ],
)
def test_what_runs_again(kind: str, save: Sequence[str], every: int, attention: int, has_more_mm: bool) -> None:
    plain, again = counted("dense"), counted("dense", remat(kind, save=save, every=every))
    assert plain[ATTENTION] == BLOCKS
    assert again[ATTENTION] - plain[ATTENTION] == attention
    assert (again[MM] + again["aten::addmm"] > plain[MM] + plain["aten::addmm"]) == has_more_mm
    assert again[EMBED] == plain[EMBED]  # what is outside of blocks runs once


@pytest.mark.parametrize(
    ("transforms", "again"),
    [
        ([remat("block", num_layers=1)], 2),  # the first block of each stack
        ([remat("block", num_layers=9)], BLOCKS),
        ([remat("full", where="vision")], VISION),
        ([remat("full", where="text")], TEXT),
        ([remat("full", where="vision"), remat("selective", save=("attention",), where="text")], VISION),
        ([remat("block", where="text"), remat("full", where="vision")], VISION + 1),
        ([remat("uniform", num_layers=2, where="text")], TEXT),
    ],
)
def test_some_blocks_and_some_stacks(transforms: Sequence[Any], again: int) -> None:
    assert counted("dense", *transforms)[ATTENTION] - counted("dense")[ATTENTION] == again


def run_blocks(num: int, between: Sequence[int], *transforms: Any, each: bool = False) -> tuple[Any, int]:
    """Outputs and gradients of a stack of small blocks, and the bytes that autograd keeps."""
    program = pipe(Program.of(None), *transforms)
    seen: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x.detach()

    def block(params: Any, x: torch.Tensor, scale: torch.Tensor, own: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tanh(torch.tanh(x @ params["w"]).sin() * scale).cos() * own
        return x, x.sum()

    g = torch.Generator().manual_seed(0)
    layers = [{"w": torch.randn(8, 8, generator=g).requires_grad_()} for _ in range(num)]
    x, scale = torch.ones(16, 8, requires_grad=True), torch.tensor(2.0)
    given = {"each": [1.0 + i for i in range(num)]} if each else {}
    taps = {i: (lambda x, i=i: (x + i, i)) for i in between}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y, outs, tapped = program.ops.stack(program.ops.layer, block, layers, x, scale, between=taps, **given)
    grads = torch.autograd.grad(y.sum() + sum(outs), [x, *(layer["w"] for layer in layers)])
    assert tapped == {i: i for i in between}
    return [y, *outs, *grads], sum(seen.values()) - sum(layer["w"].nbytes for layer in layers)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("between", [(), (0,), (1, 2, 6)])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_groups_of_blocks(size: int, between: Sequence[int], each: bool) -> None:
    """The same bits, and the input of every group alone is kept; groups end where something happens between blocks."""
    want, _ = run_blocks(7, between, each=each)
    got, kept_bytes = run_blocks(7, between, remat("uniform", num_layers=size), each=each)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    ends = [i for i in range(7) if i in between or i == 6]
    starts = [0, *(i + 1 for i in ends[:-1])]
    num_groups = sum(-(-(end + 1 - start) // size) for start, end in zip(starts, ends, strict=True))
    assert kept_bytes - 16 * 8 * 4 * num_groups in (-(8 * 8 * 4) * 7, -(8 * 8 * 4) * 7 + 4)  # and the scale


def test_experts_are_kept() -> None:
    plain = counted("moe")
    assert plain[GROUPED] > 0
    full = counted("moe", remat("full"))
    kept = counted("moe", remat("selective", save=("experts",)))
    # The second product of a block need not run again: nothing behind it saves what it gives but the sum over experts.
    assert full[GROUPED] - plain[GROUPED] in (TEXT, 2 * TEXT)
    assert kept[GROUPED] == plain[GROUPED]


def test_saved_memory() -> None:
    """What autograd keeps of a recomputed block is its input alone."""

    def kept_bytes(*transforms: Any) -> int:
        program = pipe(Program.of(None), *transforms)
        seen: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        def block(params: Any, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return torch.tanh(torch.tanh(x @ params["w"]).sin()).cos(), None

        layers = [{"w": torch.eye(8).requires_grad_()} for _ in range(3)]
        x = torch.ones(16, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            program.ops.stack(program.ops.layer, block, layers, x)
        return sum(seen.values())

    input_bytes = 16 * 8 * 4
    assert kept_bytes(remat("full")) == 3 * input_bytes
    assert kept_bytes() > 3 * 3 * input_bytes


@pytest.mark.parametrize("save", [(), ("experts",), ("exchange",), ("experts", "exchange")])
@pytest.mark.parametrize("kind", ["dropless", "capacity"])
def test_exchanges_are_kept(kind: str, save: Sequence[str]) -> None:
    """Of a layer's exchanges recomputation repeats none, counts and the host's read of them included, or all."""
    case, layers = Case.of(2, "uneven", is_even=kind == "capacity"), len(expert_cases.SPECS)
    policy = remat("selective", save=save) if save else remat("full")
    forwards = 1 if "exchange" in save else 2

    def fn(mesh: Mesh) -> tuple[dict[str, torch.Tensor], Counter[str]]:
        with Count() as count:
            found = expert_cases.on_mesh(expert_cases.build(mesh, policy, data_parallel(), expert_parallel(kind)), case)
        return found, count.ran

    world = run_virtual(Layout(dp=2, ep=2), fn)
    expert_cases.check(case, [found for found, _ in world.results])
    for calls, (_, ran) in zip(world.calls, world.results, strict=True):
        sites = Counter(call.site for call in calls if (call.axis, call.name) == ("ep", "all_to_all"))
        assert sites == {"expert counts": layers * forwards, "experts": layers * (2 * forwards + 2)}
        assert ran["mmfn::all_to_all"] == sites.total()
        assert ran["mmfn::host_copy"] == (layers * forwards if kind == "dropless" else 0)
        assert (ran[GROUPED] == 4 * layers) == ("experts" in save)  # two forward, and two for their inputs' gradients


def test_exchanges_of_heads_are_not_those_of_experts() -> None:
    """Among the same ranks; what is kept is asked for by name."""

    def exchanges(*save: str) -> Counter[tuple[str, str]]:
        transforms = (
            remat("selective", save=save),
            spread("ulysses"),
            expert_parallel(),
            data_parallel(),
        )
        layout = Layout(dp=2, cp=2, ulysses=2, ep=2)
        assert layout.partition("ep") == layout.partition("ulysses")
        world = check_cell(Cell(layout=layout, name=f"keeps {save}", transforms=transforms, family="moe"))
        return Counter((c.axis, c.site) for c in world.calls[0] if c.name == "all_to_all")

    repeated, kept = exchanges("attention"), exchanges("attention", "exchange")
    assert repeated - kept == {("ep", "experts"): 2 * TEXT, ("ep", "expert counts"): TEXT}
    assert kept - repeated == {}


def test_an_exchange_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="remat got save 'exchange' but ep is 1, so that no rows are exchanged; leave"):
        pipe(Program.of(None), remat("selective", save=("attention", "exchange")))
    moe = model_of("moe", TEXT)

    def on_ep(mesh: Mesh, where: str) -> tuple[str, ...]:
        program = Program.of(moe.family.specs(moe.cfg), mesh=mesh)
        return pipe(program, remat("selective", save=("exchange",), where=where)).notes

    layout = Layout(dp=2, ep=2)
    with pytest.raises(ValueError, match="remat got save 'exchange' but the stack 'vision' has no experts; leave it"):
        virtual(layout, lambda mesh: on_ep(mesh, "vision"))
    for where in ("all", "text"):
        notes = virtual(layout, lambda mesh, where=where: on_ep(mesh, where))
        assert all(note.startswith("remat('selective', save=['exchange']") for (note,) in notes)


def test_notes() -> None:
    program = pipe(Program.of(None), remat("selective", save=("attention",), every=2), remat("none"))
    assert program.notes == ("remat('selective', save=['attention'], every=2)",)
    assert pipe(Program.of(None), remat("full")).notes == ("remat('full')",)


def test_facts_for_plans() -> None:
    specs = {"text": {"layers": []}, "vision": {"layers": []}, "head": {}}
    program = pipe(
        Program.of(specs), remat("full", every=2), remat("uniform", num_layers=3), remat("block", num_layers=4)
    )
    assert (program.period, program.num_special) == (6, 4)
    program = pipe(Program.of(specs), remat("uniform", num_layers=3, where="vision"))
    assert (program.period, program.num_special) == (1, 0)
    assert program.notes == ("remat('uniform', num_layers=3, where='vision')",)
    for name in ("audio", "head"):
        sentence = f"remat got where='{name}' but the model has stacks vision, text; use one"
        with pytest.raises(ValueError, match=sentence):
            pipe(Program.of(specs), remat("full", where=name))


def test_errors() -> None:
    with pytest.raises(
        ValueError, match="remat kind 'half' is unknown; use one of none, full, selective, uniform, block"
    ):
        remat("half")
    with pytest.raises(ValueError, match="remat kind 'uniform' got num_layers=0; it must be at least 1"):
        remat("uniform", num_layers=0)
    with pytest.raises(ValueError, match=r"remat kind 'full' got num_layers=2; .* is for uniform or block only"):
        remat("full", num_layers=2)
    with pytest.raises(ValueError, match=r"remat kind 'block' got every=2; .* is for full or selective only"):
        remat("block", every=2)
    with pytest.raises(ValueError, match=r"remat cannot save 'norm', which is no op of the table; nearest is '.*norm'"):
        remat("selective", save=("attention", "norm"))
    with pytest.raises(ValueError, match=r"remat kind 'selective' got save=\[\]; name what to save"):
        remat("selective")
    with pytest.raises(ValueError, match=r"remat kind 'full' got save=\['matmul'\]; .* only for 'selective'"):
        remat("full", save=("matmul",))
    with pytest.raises(ValueError, match="remat kind 'full' got every=0; it must be at least 1"):
        remat("full", every=0)
    with pytest.raises(ValueError, match="remat kind 'none' got every=2"):
        remat("none", every=2)
