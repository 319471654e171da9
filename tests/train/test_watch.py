"""What stands around ops changes no bit, finds nothing where nothing is wrong, and names the op, the block and the pass
where something is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from mmfn import ops as tables
from mmfn.train.run.replay.judge import Judge
from mmfn.train.run.replay.watch import Finding, Watch
from tests import tiny
from tests.train.watch_cases import Bend, differentiate, faulty, nan, off, on_ranks, scaled, watched

NAMES = [name for name in tiny.TINY if name != "small"]  # that one is for graphs alone
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_watched_pass_is_the_pass_and_nothing_is_named(name: str, dtype: torch.dtype) -> None:
    """Blocks computed again in float32; every op of the pass is held against the reference in float64."""
    kind = "full" if dtype == torch.float32 else "none"
    watch = Watch(Judge(ops=tables.reference(), dtype=torch.float64))
    grads, metrics = differentiate(name, tables.portable(), watch, dtype, kind)
    plain, numbers = differentiate(name, tables.portable(), dtype=dtype)
    assert watch.findings == []
    assert watch.num_calls > 40
    assert watch.worst is not None
    assert list(grads) == list(plain)
    for path, grad in grads.items():
        assert torch.equal(grad, plain[path]), path
    assert all(torch.equal(metrics[key], numbers[key]) for key in numbers)


@dataclass(frozen=True)
class Fault:
    """A fault of a tiny model's op, and where it is: `where` is what the first finding begins with."""

    model: str
    op: str
    call: int
    where: str
    bend: Bend = off


FORWARD = (
    Fault("dense", "rms_norm", 2, "text/layers/0 / rms_norm / attention/q_norm/weight"),
    Fault("dense", "swiglu", 2, "text/layers/1 / swiglu / call 1", scaled),
    Fault("dense", "attention", 3, "text/layers/0 / attention / call 1"),
    Fault("dense", "rotary", 8, "text/layers/1 / rotary / call 2"),
    Fault("dense", "gelu", 1, "gelu / call 1", nan),
    Fault("dense", "linear_cross_entropy", 1, "linear_cross_entropy / text/embed/weight", scaled),
    Fault("moe", "experts", 2, "text/layers/1 / experts / moe/experts/down, moe/experts/gate_up"),
    Fault("moe", "combine", 1, "text/layers/0 / combine / call 1"),
    Fault("windows", "linear", 2, "vision/layers/0 / linear / attention/qkv/weight, attention/qkv/bias"),
    Fault("glm", "route", 1, "text/layers/1 / route / moe/router/choice_bias", scaled),
    Fault("glm", "interpolate", 1, "interpolate / vision/positions/weight"),
    Fault("omni", "layer_norm", 2, "audio/layers/0 / layer_norm / mlp_norm/weight, mlp_norm/bias"),
    Fault("delta", "gated_delta_rule", 1, "text/layers/0 / gated_delta_rule / call 1"),
    Fault("delta", "causal_conv1d", 1, "text/layers/0 / causal_conv1d / delta/conv/kernel", nan),
    Fault("delta_moe", "rms_norm_gated", 1, "text/layers/0 / rms_norm_gated / delta/norm/weight", scaled),
)
BACKWARD = (
    Fault("dense", "rms_norm", 8, "text/layers/1 / rms_norm / mlp_norm/weight"),
    Fault("dense", "swiglu", 1, "text/layers/0 / swiglu / call 1", nan),
    Fault("dense", "attention", 4, "text/layers/1 / attention / call 1", scaled),
    Fault("moe", "experts", 1, "text/layers/0 / experts / moe/experts/down, moe/experts/gate_up", scaled),
    Fault("glm", "route", 1, "text/layers/1 / route / moe/router/choice_bias"),
    Fault("omni", "gelu_tanh", 2, "vision/layers/1 / gelu_tanh / call 1"),
    Fault("delta", "gated_delta_rule", 1, "text/layers/0 / gated_delta_rule / call 1"),
    Fault("windows", "linear_cross_entropy", 1, "linear_cross_entropy / head/weight", scaled),
)


def first_of(findings: Sequence[Finding], fault: Fault) -> Finding:
    assert findings, f"{fault} was not found"
    first = findings[0]
    assert str(first).startswith(f"{fault.where}, "), first
    assert (first.error is None) == (fault.bend is nan)
    return first


@pytest.mark.parametrize("fault", FORWARD, ids=lambda f: f"{f.model} {f.op}")
def test_a_wrong_result_is_named(fault: Fault) -> None:
    watch = watched(fault.model, faulty(tables.portable(), fault.op, fault.call, fault.bend, is_forward=True))
    first = first_of(watch.findings, fault)
    assert first.pass_ == "forward"
    assert first.tensor in ("output", "output 0")


@pytest.mark.parametrize("fault", BACKWARD, ids=lambda f: f"{f.model} {f.op}")
def test_a_wrong_gradient_is_named(fault: Fault) -> None:
    """The forward is right to the last bit."""
    watch = watched(fault.model, faulty(tables.portable(), fault.op, fault.call, fault.bend, is_forward=False))
    first = first_of(watch.findings, fault)
    assert first.pass_ == "backward"
    assert first.tensor == "gradient of input 0"


def test_a_number_that_is_none_is_named_without_another_table() -> None:
    """Where it enters: here between two ops, in features that are added behind the first block."""
    ops = replace(tables.portable(), place_features=lambda x, index: nan(tables.place_features(x, index)))
    watch = Watch()
    differentiate("dense", ops, watch)
    assert str(watch.findings[0]) == (
        "text/layers/1 / rms_norm / attention_norm/weight, forward, input 0 float32[37, 20] is not finite at [18, 10]"
    )


def test_ranks_are_watched_each() -> None:
    """What they compute is the same, bit for bit; kernels that transforms call in a backward of their own are seen."""
    found, expected = (on_ranks(tables.portable(), has_watch) for has_watch in (True, False))
    for (watch, grads), (_, plain) in zip(found, expected, strict=True):
        assert watch.findings == []
        assert watch.num_calls > 60
        for path, grad in grads.items():
            assert torch.equal(grad, plain[path]), path
    wrong = faulty(tables.portable(), "attention_block_grad", None, scaled, is_forward=True)
    for watch, _ in on_ranks(wrong, True):
        assert str(watch.findings[0]).startswith("text/layers/1 / attention_block_grad / call 1, backward, output 0 ")
