"""Steps whose parameters lie on the host: bit for bit those of the same program with its parameters on the device."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import tree
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.offload import offload
from mmfn.train import optim
from mmfn.train.step import init_state, make_step
from tests.parallel.conformance import Cell, batch_of
from tests.tiny import model_of
from tests.train.hosted_cases import ALL, CASES, PARAMETERS
from tests.train.hosted_steps import BAD, NUM_STEPS, RATE, take_steps


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
