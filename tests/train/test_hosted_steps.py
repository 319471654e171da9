"""Steps whose parameters lie on the host: bit for bit those of the same program with its parameters on the device."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from mmfn import tree
from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.program import Program, Transform, pipe
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.transforms.precision import precision
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.transforms.vocabulary_parallel import vocabulary_parallel
from mmfn.parallel.weights.host_memory import HOST
from mmfn.parallel.weights.hosted import fetch_in_graph
from mmfn.parallel.weights.sharding import local, shard_params
from mmfn.spec import trained_paths
from mmfn.train import optim
from mmfn.train.guard import Guard
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step
from tests import tiny
from tests.batches import with_inputs
from tests.parallel.conformance import Cell, batch_of, spread
from tests.tiny import TRAINED, model_of

# torch's compiler reads `.grad` of non-leaf inputs and hides the warning by a means that "error" defeats
QUIET_DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
PARAMETERS, ALL = ("parameters",), ("parameters", "optimizer")
RATE = schedule("cosine", peak=1e-2, num_steps=9, warmup_steps=1)
ALONE = Layout()
NUM_STEPS, BAD = 4, 2  # the step of number BAD is not finite


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program and its optimizer. `what`: of the optimizer, what lies on the host."""

    transforms: tuple[Transform, ...] = ()
    layout: Layout = ALONE
    family: str = "dense"
    trained: str = "all"
    optimizer: str = "adamw"
    what: tuple[str, ...] = PARAMETERS
    dtype: torch.dtype = torch.float64
    num_layers: int = 3
    micro_batches: int = 1
    kind: str = "gather"


FULL, KEPT = remat("full"), data_parallel(keep_gathered=True)
MESH = (data_parallel(), expert_parallel())
ONE: dict[str, Case] = {
    "plain": Case(),
    "remat": Case(transforms=(FULL,)),
    "uniform": Case(transforms=(remat("uniform", num_layers=2),), num_layers=5),
    "block": Case(transforms=(remat("block"),)),
    "selective": Case(transforms=(remat("selective", save=("attention", "matmul")),)),
    "no prefetch": Case(transforms=(data_parallel(prefetch=False), FULL)),
    "kept": Case(transforms=(KEPT, FULL)),
    "activations": Case(transforms=(offload("activations"),), what=ALL),
    "activations, remat": Case(transforms=(offload("activations"), FULL), what=ALL),
    "experts": Case(family="moe", transforms=(FULL,)),
    "micro-batches": Case(micro_batches=3, transforms=(FULL,)),
    "float32": Case(transforms=(precision(compute=torch.float32), FULL)),
    "bfloat16": Case(transforms=(precision(compute=torch.bfloat16),), dtype=torch.float32),
    "frozen tower": Case(trained="decoder", transforms=(FULL,)),
    "frozen blocks": Case(trained="second block", transforms=(FULL,), num_layers=2),
    "lora": Case(trained="lora", family="moe", transforms=(FULL,)),
    "lora of all": Case(trained="lora of all"),
    "muon": Case(optimizer="muon"),
    "ema": Case(optimizer="ema", what=ALL),
    "master": Case(optimizer="master", dtype=torch.bfloat16),
    "rules": Case(optimizer="rules", what=ALL, micro_batches=2),
}
SEVERAL: dict[str, Case] = {
    "dp": Case(layout=Layout(dp=2), transforms=(*MESH, FULL)),
    "dp, plain": Case(layout=Layout(dp=3), transforms=MESH, what=ALL),
    "dp, no prefetch": Case(layout=Layout(dp=2), transforms=(data_parallel(prefetch=False), FULL)),
    "dp, kept": Case(layout=Layout(dp=2), transforms=(KEPT, FULL)),
    "dp, bfloat16": Case(layout=Layout(dp=2), transforms=(*MESH, precision(compute=torch.bfloat16), FULL)),
    "dp, head": Case(layout=Layout(dp=2), transforms=(*MESH, vocabulary_parallel(), FULL)),
    "dp, lora": Case(layout=Layout(dp=2), trained="lora", family="moe", transforms=(*MESH, FULL)),
    "dp, muon": Case(layout=Layout(dp=3), optimizer="muon", transforms=MESH, what=ALL),
    "hsdp, uniform": Case(layout=Layout(replicate=2, dp=2), transforms=(*MESH, remat("uniform", num_layers=2))),
    "ep": Case(layout=Layout(dp=2, ep=2), family="moe", transforms=(*MESH, FULL), micro_batches=2),
    "edp, ema": Case(layout=Layout(dp=4, ep=2), family="moe", optimizer="ema", transforms=(*MESH, FULL)),
    "cp": Case(
        layout=Layout(cp=2),
        kind="ring",
        transforms=(*MESH, FULL, spread("ring")),
    ),
    "all, frozen": Case(
        layout=Layout(dp=2), trained="decoder", transforms=(*MESH, FULL, offload("activations")), what=ALL
    ),
}
CASES = ONE | SEVERAL


class OnlyCopies(TorchDispatchMode):
    """Refuses every operator on the memory of some tensors but copies from and to it, and looks at it.

    So a device whose memory is another than the host's would do the same.
    """

    is_eager = True  # hand-written Functions run as in plain eager execution

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.storages = {x.untyped_storage()._cdata for x in tensors}
        self.num_copies = self.num_buffers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        given = [x for x in tree.leaves([list(args), dict(kwargs or {})]) if isinstance(x, Tensor)]
        if any(local(x).untyped_storage()._cdata in self.storages for x in given):
            assert func in ALLOWED, f"{func} on what lies on the host"
            self.num_copies += func is torch.ops.aten.copy_.default
        self.num_buffers += func is torch.ops.mmfn.counted_empty.default and args[2] == HOST
        return func(*args, **(kwargs or {}))


ALLOWED = {
    torch.ops.aten.copy_.default,
    torch.ops.aten.detach.default,
    torch.ops.mmfn.counted_empty.default,
    fetch_in_graph._opoverload,
}


def build_optimizer(name: str, specs: Any) -> optim.Transform:
    """All kinds of what writes parameters."""
    adamw = optim.adamw(eps=1e-3, weight_decay=0.1)
    if name == "muon":
        return optim.with_others(optim.muon(compute=torch.float32), adamw, specs)
    if name == "ema":
        return optim.chain(adamw, optim.ema(0.9))
    if name == "master":
        return optim.master(adamw)
    if name == "rules":
        return optim.by_path(adamw, no_decay=[".*bias"], lr_scales=[("vision/.*", 0.1)], layer_decay=0.9)
    return adamw


def take_steps(case: Case, mesh: Mesh, *, is_hosted: bool, is_watched: bool) -> list[Any]:
    """After each step: metrics and copies of the state's leaves."""
    model = model_of(case.family, case.num_layers)
    specs = TRAINED[case.trained](model.family, model.cfg)
    program = pipe(Program.of(specs, mesh=mesh), *case.transforms, *([offload("parameters")] if is_hosted else []))
    params = tree.map(lambda x: x.to(case.dtype), tiny.with_adapters(model.params, specs))
    params = shard_params(params, program.specs, mesh) if mesh.layout.world > 1 else params
    writer = build_optimizer(case.optimizer, specs)
    writer = optim.on_host(writer, 700, what=case.what) if is_hosted else writer
    optimizer = optim.chain(optim.clip_by_global_norm(0.5), writer)
    guard = Guard(window=4, factor=100.0)
    step = make_step(model.family, model.cfg, program, "per_token_loss", optimizer, schedule=RATE, guard=guard)
    state = init_state(params, optimizer, specs, guard)
    pack = {"segment_multiple": segment_multiple(case.kind, case.layout)} if case.layout.cp > 1 else {}
    cell = Cell(layout=case.layout, name="", transforms=(), family=case.family, num_layers=case.num_layers, pack=pack)
    batch = program.split(batch_of(cell, mesh["batch"].index, mesh["batch"].size))
    bad = with_inputs(batch, lambda x: x * torch.nan)
    found, places = [], [local(x).data_ptr() for x in tree.leaves(state["params"])]
    for number in range(NUM_STEPS):
        watch = OnlyCopies([local(x) for x in tree.leaves(state["params"])])
        with watch if is_watched else nullcontext():
            state, metrics = step(state, [bad if number == BAD else batch] * case.micro_batches)
        assert [local(x).data_ptr() for x in tree.leaves(state["params"])] == places, "they stay where they are"
        assert number == 0 or watch.num_buffers == 0, "buffers of the host are made once"
        assert not is_watched or watch.num_copies >= len(places) + len(trained_paths(specs))
        found.append((metrics, {path: local(x).clone() for path, x in tree.items(state)}))
    return found


def assert_same(want: Sequence[Any], got: Sequence[Any], layout: Layout) -> None:
    """Bit by bit."""
    for (metrics, state), (own_metrics, own_state) in zip(want, got, strict=True):
        assert state.keys() == own_state.keys()
        for name, x in metrics.items() | state.items():
            other = {**own_metrics, **own_state}[name]
            assert x.dtype == other.dtype
            assert torch.equal(x.nan_to_num(), other.nan_to_num()), f"{layout}: {name}"


def changed(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return any(not torch.equal(a[path], b[path]) for path in a if path.startswith("params/"))


QUICK = ("remat", "no prefetch", "kept", "experts", "activations, remat", "lora", "ema", "dp", "all, frozen")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_steps_are_those_with_parameters_on_the_device(name: str) -> None:
    case = CASES[name]

    def run(mesh: Mesh) -> None:
        want, got = (take_steps(case, mesh, is_hosted=is_moved, is_watched=is_moved) for is_moved in (False, True))
        assert_same(want, got, case.layout)
        assert [int(metrics["skipped"]) for metrics, _ in got] == [int(n == BAD) for n in range(NUM_STEPS)]
        states = [state for _, state in got]
        assert changed(states[0], states[1])
        assert not changed(states[BAD - 1], states[BAD])
        assert changed(states[BAD], states[BAD + 1])
        kept = [path for path in states[0] if path.startswith(("params/", "opt/"))]
        assert all(torch.equal(states[BAD - 1][path], states[BAD][path]) for path in kept)

    virtual(case.layout, run)


COMPILED: dict[str, tuple[Transform, ...]] = {
    "plain": (),
    "remat": (FULL,),
    "kept": (KEPT, FULL),
    "bfloat16 rules": (precision(compute=torch.bfloat16), FULL),
}


@QUIET_DYNAMO
@pytest.mark.parametrize("is_again", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_graph_copies_again_what_it_computes_again(is_again: bool) -> None:
    """So that a compiled block frees its copies as an eager one does; without remat its backward copies nothing."""
    copies: dict[str, list[int]] = {"forward": [], "backward": []}

    def count(graph: torch.fx.GraphModule, _: Any, part: str) -> Any:
        copies[part].append(sum(node.target is fetch_in_graph._opoverload for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=partial(count, part="forward"),
        bw_compiler=partial(count, part="backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    case = Case(transforms=(*([FULL] if is_again else []), compiled("layer", backend=backend)))
    take_steps(case, single_mesh(), is_hosted=True, is_watched=False)
    model = model_of(case.family, case.num_layers)
    specs = model.family.specs(model.cfg)
    assert copies["forward"] == [len(tree.leaves(specs[name]["layers"][0])) for name in ("vision", "text")]
    assert len(copies["backward"]) == 2
    assert all((0 < num <= max(copies["forward"])) == is_again for num in copies["backward"])


def test_a_state_that_is_not_donated_is_left_as_it_was() -> None:
    model = model_of("dense", 2)
    program = pipe(Program.of(model.family.specs(model.cfg)), offload("parameters"))
    optimizer = optim.on_host(optim.adamw(), 500, what=ALL)
    step = make_step(model.family, model.cfg, program, "per_token_loss", optimizer, schedule=RATE, donate=False)
    state = init_state(model.params, optimizer)
    state = {**state, "step": state["step"] + 1}  # behind the warmup's rate of 0
    before = [x.clone() for x in tree.leaves(state)]
    batch = batch_of(Cell(layout=Layout(), name="", transforms=()))
    after, again = step(state, [batch])[0], step(state, [batch])[0]
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(state), before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(after), tree.leaves(again), strict=True))
    assert not torch.equal(after["params"]["text"]["norm"]["weight"], state["params"]["text"]["norm"]["weight"])


@pytest.mark.parametrize(("is_moved", "is_hosted"), [(False, True), (True, False)])
def test_program_and_optimizer_must_agree(is_moved: bool, is_hosted: bool) -> None:
    model = model_of("dense", 2)
    program = pipe(Program.of(model.family.specs(model.cfg)), *([offload("parameters")] if is_hosted else []))
    optimizer = optim.chain(optim.on_host(optim.adamw(), what=PARAMETERS) if is_moved else optim.adamw())
    fix = r"wrap it in on_host\(" if is_hosted else r"add offload\('parameters'\) to it"
    with pytest.raises(ValueError, match=fix):
        make_step(model.family, model.cfg, program, "per_token_loss", optimizer, schedule=RATE)


@QUIET_DYNAMO
@pytest.mark.parametrize("name", [n if n == "remat" else pytest.param(n, marks=pytest.mark.slow) for n in COMPILED])
def test_compiled_layers(name: str) -> None:
    """Against the same program in eager execution, with its parameters on the device."""
    dtype = torch.float32 if "bfloat16" in name else torch.float64
    case = Case(transforms=COMPILED[name], dtype=dtype, what=ALL)
    graph = replace(case, transforms=(*case.transforms, compiled("layer", backend="aot_eager")))

    want = take_steps(case, single_mesh(), is_hosted=False, is_watched=False)
    got = take_steps(graph, single_mesh(), is_hosted=True, is_watched=False)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    for (_, state), (_, own) in zip(want, got, strict=True):
        for path, x in state.items():
            torch.testing.assert_close(own[path], x, rtol=tolerance, atol=tolerance)
