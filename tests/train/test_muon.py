"""The parts of Muon: iterations against singular values, which leaves are matrices, how exchanges are grouped."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmfn.models import family
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.mesh.virtual import run_virtual
from mmfn.spec import freeze
from mmfn.train import optim
from mmfn.train.optim import Facts, Update
from mmfn.train.optim.muon import is_matrix, orthogonalize, with_others
from mmfn.train.planning import step_trace
from mmfn.tree import items, leaves
from tests.parallel.plan_cases import hf_config, make
from tests.train.optim_cases import MATRICES, SPECS, muon, train


def specs(*, moe: bool) -> object:
    hf = hf_config(moe=moe)
    found = family(hf["model_type"])
    return found.specs(found.config_from_hf(hf))


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 4, 9), (2, 9, 4)])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_result_is_the_polar_factor_with_other_singular_values(shape: tuple[int, ...], parts: int) -> None:
    g = torch.Generator().manual_seed(1)
    x_NRC = torch.randn(shape[0], shape[1] * parts, shape[2], generator=g, dtype=torch.float64)
    y_NRC = orthogonalize(x_NRC, parts, 5)
    for x, y in zip(x_NRC.view(-1, *shape[1:]), y_NRC.view(-1, *shape[1:]), strict=True):
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        torch.testing.assert_close(y, u @ torch.diag(s) @ vh, rtol=1e-11, atol=1e-11)
        assert s.min() > 0.3
        assert s.max() < 1.3


def test_bfloat16_iterations_are_those_of_torch() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(24, 40, generator=g)
    weight = torch.nn.Parameter(torch.zeros_like(x))
    oracle = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="original")
    weight.grad = x
    oracle.step()
    found = orthogonalize(x.bfloat16()[None], 1, 5)[0]
    torch.testing.assert_close(found.float(), -weight.detach(), rtol=0, atol=2e-2)
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 5), 1, 5), torch.zeros(1, 3, 5))


class _Moves(TorchDispatchMode):
    """Notes tensors that go from the host to the device "meta"."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and out.device.type == "meta":
            self.moved.append(out.shape)
        return out


def test_the_learning_rate_stays_on_the_host() -> None:
    tx = optim.muon(compute=torch.float32)
    params, grads = ({"w": torch.empty(4, 3, device="meta")} for _ in range(2))
    norm, finite = torch.empty((), device="meta"), torch.empty((), dtype=torch.bool, device="meta")
    lr = torch.tensor(0.1, dtype=torch.float64)
    u = Update(params=params, grads=grads, norm=norm, finite=finite, lr=lr, step=torch.tensor(0))
    with _Moves() as moves:
        lr.to("meta")
        tx.update({"w": Facts(shape=(4, 3))})(u, tx.init(params))
    assert moves.moved == [torch.Size([])]  # the one above


@pytest.mark.parametrize("moe", [False, True])
def test_matrices_are_chosen_by_axes(moe: bool) -> None:
    chosen = {path for path, spec in items(specs(moe=moe)) if is_matrix(spec)}
    assert "text/layers/0/attention/q/weight" in chosen
    assert "vision/layers/1/attention/qkv/weight" in chosen
    assert any(path.endswith("experts/gate_up") for path in chosen) is moe
    for path in ("text/embed/weight", "head/weight", "vision/positions/weight", "text/norm/weight"):
        assert path not in chosen
    assert not any(path.endswith("bias") for path in chosen)
    assert {path for path, spec in SPECS.items() if is_matrix(spec)} == set(MATRICES)


def test_the_choice_holds_for_frozen_leaves_and_other_depths() -> None:
    found = specs(moe=False)
    tx = with_others(optim.muon(), optim.adamw(), freeze(found, ["vision/.*", "text/embed/.*"]))
    text = {path: torch.zeros(spec.shape) for path, spec in items(found) if path.startswith(("text/layers", "head"))}
    state = tx.init(text | {"text/norm/weight": torch.zeros(64)})
    assert "text/layers/1/mlp/up/weight" in state[0]["momentum"]
    assert set(state[1]["m"]) == {p for p in text if "norm" in p or p == "head/weight"} | {"text/norm/weight"}
    shallow = {path: x for path, x in text.items() if not path.startswith("text/layers/1")}
    assert len(leaves(tx.init(shallow | {"text/norm/weight": torch.zeros(64)}))) < len(leaves(state))


@pytest.mark.parametrize("layout", [{"dp": 3}, {"moe": True, "replicate": 2, "dp": 2, "ep": 2}], ids=str)
def test_a_plan_is_what_runs(layout: dict[str, Any]) -> None:
    setup, sizes = make(**layout)
    chosen = with_others(optim.muon(), optim.adamw(), specs(moe="moe" in layout))
    setup = replace(setup, optimizer=optim.chain(optim.clip_by_global_norm(0.5), chosen, optim.ema(0.9)))
    planned, real = (step_trace.trace_step(setup, sizes, 2, is_fake=is_fake) for is_fake in (True, False))
    assert any(key.site == "muon" for key in planned.count)
    assert (planned.count, planned.sent_bytes) == (real.count, real.sent_bytes)
    assert planned.peaks == real.peaks


def test_exchanges_are_as_few_as_matrices_allow() -> None:
    """Three alike matrices on three ranks: one exchange there and one back. Experts by expert rank: theirs alone."""
    world = run_virtual(Layout(dp=3), lambda mesh: train(muon(), [0], mesh))
    calls = [call for call in world.calls[0] if call.site == "muon"]
    assert len([call for call in calls if call.shape == (3, 2, 7)]) == 2
    assert {call.name for call in calls} == {"all_to_all"}
    assert {call.axis for call in calls} == {"shard", "edp"}
    world = run_virtual(Layout(dp=2, ep=2), lambda mesh: train(muon(), [0], mesh))
    assert not any(call.axis == "edp" for call in world.calls[0] if call.site == "muon")  # whole experts on every rank
