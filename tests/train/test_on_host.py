"""An optimizer on the host does what it does on the device, bit by bit, group by group."""

from typing import Any

import pytest
import torch

from mmfn import tree
from mmfn.parallel.mesh.layout import Layout, Mesh, make_mesh, single_mesh
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.weights.host_memory import HostMemory
from mmfn.parallel.weights.sharding import local, sharding_of, wrap
from mmfn.spec import ONES, spec
from mmfn.train import optim
from mmfn.train.optim import Leaves, Transform, Update, facts_of
from mmfn.train.optim.on_host import _groups
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step
from tests import tiny
from tests.parallel import conformance
from tests.parallel.conformance import Cell

SPECS = {
    "text/embed/weight": spec((11, 6), "vocab embed", ONES),
    "text/layers/0/q": spec((6, 6), "q_heads embed", ONES),
    "text/layers/0/norm": spec((6,), "embed", ONES),
    "text/layers/1/q": spec((6, 6), "q_heads embed", ONES),
    "text/layers/1/norm": spec((6,), "embed", ONES),
}
ADAMW = optim.adamw(weight_decay=0.1)
OPTIMIZERS: dict[str, Transform] = {
    "adamw": ADAMW,
    "sgd": optim.sgd(momentum=0.9, nesterov=True, weight_decay=0.1),
    "by path": optim.by_path(ADAMW, no_decay=[".*norm"], lr_scales=[("text/layers/0/.*", 0.5)], layer_decay=0.9),
    "ema": optim.chain(ADAMW, optim.ema(0.9)),
    "master": optim.master(ADAMW),
    "masked": optim.chain(optim.masked(ADAMW, [".*norm"]), optim.masked(optim.sgd(momentum=0.9), [".*(q|weight)"])),
    "muon": optim.with_others(optim.muon(compute=torch.float32), ADAMW, SPECS),
}


def run(transform: Transform, mesh: Mesh, dtype: torch.dtype, kernel: str = "fused") -> tuple[Leaves, Any]:
    """Four steps, the third one skipped."""
    g = torch.Generator().manual_seed(0)

    def draw() -> Leaves:
        return {p: torch.randn(s.shape, generator=g).to(dtype) for p, s in SPECS.items()}

    params = draw()
    state, update = transform.init(params), transform.update(facts_of(SPECS, mesh))
    for step in range(4):
        u = Update(
            params=params,
            grads=draw(),
            norm=torch.tensor(1.0),
            finite=torch.tensor(step != 2),
            lr=torch.tensor(0.1),
            step=torch.tensor(step),
            scale=torch.tensor(0.5),
            kernel=kernel,
        )
        u, state = update(u, state)
        assert u.params.keys() == SPECS.keys()
    return params, state


@pytest.mark.parametrize("what", [("optimizer",), ("parameters",), ("parameters", "optimizer")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_values", [1, 50, 10**6])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_optimizer_on_the_device(
    name: str, group_values: int, dtype: torch.dtype, what: tuple[str, ...]
) -> None:
    plain, moved = OPTIMIZERS[name], optim.on_host(OPTIMIZERS[name], group_values, what=what)
    for (params, state), kernel in ((run(moved, single_mesh(), dtype, k), k) for k in ("fused", "reference")):
        want_params, want_state = run(plain, single_mesh(), dtype, kernel)
        assert tree.paths(state) == tree.paths(want_state)
        for got, want in zip(tree.leaves((params, state)), tree.leaves((want_params, want_state)), strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


def test_state_stays_in_its_host_buffers_and_counts_on_the_device() -> None:
    transform = optim.on_host(ADAMW, 40)
    params = {p: torch.ones(s.shape) for p, s in SPECS.items()}
    state = transform.init(params)
    before = {path: x.data_ptr() for path, x in tree.items(state) if x.ndim}
    assert not any(x.data_ptr() == p.data_ptr() for x in tree.leaves(state) for p in params.values())
    grads = {p: torch.ones(s.shape) for p, s in SPECS.items()}
    one = torch.tensor(1.0)
    u = Update(params=params, grads=grads, norm=one, finite=one > 0, lr=one, step=one)
    _, after = transform.update(facts_of(SPECS, single_mesh()))(u, state)
    assert {path: x.data_ptr() for path, x in tree.items(after) if x.ndim} == before
    assert after["count"] == 1


def test_groups() -> None:
    facts = facts_of(SPECS, single_mesh())
    assert [len(g) for g in _groups(facts, 1)] == [1] * 5
    assert [len(g) for g in _groups(facts, 42)] == [1, 2, 2]
    assert [len(g) for g in _groups(facts, 10**6)] == [5]


def test_parameters_are_updated_in_copies_and_stay_where_they_are() -> None:
    """The inner optimizer never sees the memory they lie in, and the state that is not moved is its own."""
    seen: list[int] = []

    def update(facts: Any) -> Any:
        fn = ADAMW.update(facts)

        def run(u: Update, state: Any) -> Any:
            seen.extend(x.data_ptr() for x in u.params.values())
            return fn(u, state)

        return run

    transform = optim.on_host(Transform(init=ADAMW.init, update=update), 40, what=("parameters",))
    params = {p: torch.ones(s.shape) for p, s in SPECS.items()}
    before = {p: x.data_ptr() for p, x in params.items()}
    state, one = transform.init(params), torch.tensor(1.0)
    moments = {path: x.data_ptr() for path, x in tree.items(state) if x.ndim}
    grads = {p: x.clone() for p, x in params.items()}
    u = Update(params=params, grads=grads, norm=one, finite=one > 0, lr=one, step=one)
    done, after = transform.update(facts_of(SPECS, single_mesh()))(u, state)
    assert len(seen) == len(SPECS)
    assert not set(seen) & set(before.values())
    assert {p: x.data_ptr() for p, x in done.params.items()} == before
    assert not any(torch.equal(x, torch.ones_like(x)) for x in params.values())
    assert {path: x.data_ptr() for path, x in tree.items(after) if x.ndim} == moments
    assert after["count"] == 1


@pytest.mark.parametrize("what", [(), ("activations",), ("parameters", "gradients")])
def test_what_is_moved_must_be_known(what: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"on_host got what=.* but moves optimizer and parameters; name one"):
        optim.on_host(ADAMW, what=what)


def test_what_is_moved_is_known_of_what_is_combined() -> None:
    both = optim.chain(optim.clip_by_global_norm(1.0), optim.on_host(optim.on_host(ADAMW), what=("parameters",)))
    assert both.on_host == {"optimizer", "parameters"}
    assert optim.by_path(optim.masked(both, [".*"])).on_host == both.on_host
    assert optim.chain(ADAMW).on_host == frozenset()


def test_no_more_than_three_groups_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been copied in and not yet out."""
    events: list[str] = []
    copy = HostMemory.copy

    def watched(self: HostMemory, pairs: Any) -> Any:
        events.append(f"{len(pairs)}")
        return copy(self, pairs)

    monkeypatch.setattr(HostMemory, "copy", watched)
    run(optim.on_host(ADAMW, 1), single_mesh(), torch.float32)
    assert len(events) == 4 * 2 * len(SPECS)
    assert set(events) == {"2"}  # two moments in, two moments out, of one leaf at a time


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=3), Layout(replicate=2, dp=2, ep=2)], ids=str)
def test_steps_on_meshes(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards, placed as their parameters are; the step of the conformance matrix."""
    cell = Cell(layout=layout, name="on host", transforms=(data_parallel(), expert_parallel()), family="moe")
    conformance.one_device(cell)
    monkeypatch.setattr(conformance, "adamw", lambda **chosen: optim.on_host(optim.adamw(**chosen), 500))
    conformance.check_cell(cell)


def test_a_shard_stays_on_the_host_of_a_mesh_of_accelerators() -> None:
    def connect(name: str, partition: Any) -> Any:
        raise AssertionError

    mesh = make_mesh(Layout(), 0, connect, "cuda")
    values = torch.ones(3, 2)
    placed = wrap(values, torch.Size((3, 2)), sharding_of(SPECS["text/layers/0/q"], mesh))
    assert local(placed).data_ptr() == values.data_ptr()
    assert placed.device_mesh.device_type == "cuda"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's compiler itself
def test_compiled_layers_leave_the_update_eager() -> None:
    cell = Cell(layout=Layout(), name="compiled", transforms=(compiled("layer", backend="eager"),))
    model = tiny.model_of(cell.family, cell.num_layers)
    program = pipe(Program.of(model.family.specs(model.cfg)), *cell.transforms)
    rate = schedule("constant", peak=1e-2, num_steps=1)
    results = []
    for optimizer in (optim.adamw(), optim.on_host(optim.adamw(), 500)):
        step = make_step(model.family, model.cfg, program, "per_token_loss", optimizer, schedule=rate, donate=False)
        state, _ = step(init_state(model.params, optimizer), [conformance.batch_of(cell)])
        results.append(tree.leaves((state["params"], state["opt"])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    whole = pipe(program, compiled("step", backend="eager"))
    with pytest.raises(ValueError, match=r"compiled\('step'\) has no place for an optimizer on_host"):
        make_step(model.family, model.cfg, whole, "per_token_loss", optim.on_host(optim.adamw()), schedule=rate)


def test_a_graph_of_the_whole_step_is_refused() -> None:
    assert not optim.chain(optim.on_host(ADAMW)).is_traceable
    assert optim.chain(ADAMW).is_traceable
