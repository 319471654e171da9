"""Single arguments of kernels, changed on their way: each change makes a comparison with the reference fail."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmfn.ops import cuda as tables
from mmfn.ops import experts as products
from mmfn.ops import varlen
from tests.cuda import test_table
from tests.cuda.emulated import emulated

FORWARD, BACKWARD, GROUPED = "_forward", "_backward", "grouped_mm"
NORM, NORM_GRAD = "_fused", "_fused_grad"
PLACES: dict[str, Any] = {GROUPED: products.F, NORM: tables.norm, NORM_GRAD: tables.norm}
ENDS, KEY_ENDS, LONGEST, KEY_LONGEST = 3, 4, 5, 6  # places of arguments; those of a backward are 3 further
CAUSAL = 8

Change = Callable[[list[Any], dict[str, Any]], None]


def put(place: int, change: Callable[[Any], Any]) -> Change:
    def run(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[place] = change(args[place])

    return run


def named(name: str, change: Callable[[Any], Any]) -> Change:
    def run(args: list[Any], kwargs: dict[str, Any]) -> None:
        kwargs[name] = change(kwargs[name])

    return run


def swap(a: int, b: int) -> Change:
    def run(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[a], args[b] = args[b], args[a]

    return run


def shifted(ends: torch.Tensor) -> torch.Tensor:
    """Each inner boundary one later, where there is room."""
    return torch.cat([ends[:1], (ends[1:-1] + 1).minimum(ends[-1:]), ends[-1:]])


MUTANTS: dict[str, tuple[str, Change]] = {
    "the default scale is doubled": (FORWARD, named("scale", lambda x: 2 * x)),
    "no scale, as other kernels default to": (FORWARD, named("scale", lambda x: 1.0)),
    "causal or not": (FORWARD, put(CAUSAL, lambda x: not x)),
    "boundaries one off": (FORWARD, put(ENDS, shifted)),
    "boundaries of keys one off": (FORWARD, put(KEY_ENDS, shifted)),
    "lengths in place of ends": (FORWARD, put(ENDS, lambda x: x.diff(prepend=x[:1]).int())),
    "the longest segment one short": (FORWARD, put(LONGEST, lambda x: x - 1)),
    "the longest keys one short": (FORWARD, put(KEY_LONGEST, lambda x: x - 1)),
    "boundaries of 64 bits": (FORWARD, put(ENDS, lambda x: x.long())),
    "queries and keys": (FORWARD, swap(0, 1)),
    "keys and values": (FORWARD, swap(1, 2)),
    "another scale backward": (BACKWARD, named("scale", lambda x: 2 * x)),
    "causal or not backward": (BACKWARD, put(CAUSAL + 3, lambda x: not x)),
    "boundaries one off backward": (BACKWARD, put(ENDS + 3, shifted)),
    "boundaries of keys one off backward": (BACKWARD, put(KEY_ENDS + 3, shifted)),
    "the longest segment one short backward": (BACKWARD, put(LONGEST + 3, lambda x: x - 1)),
    "the output of the block": (BACKWARD, put(4, lambda x: 0 * x)),
    "gradient and output": (BACKWARD, swap(0, 4)),
    "log-sum-exp by tokens": (BACKWARD, put(5, lambda x: x.t().contiguous())),
    "log-sum-exp without what was added": (BACKWARD, put(5, lambda x: x + 0.1)),
    "keys and values backward": (BACKWARD, swap(2, 3)),
    "counts in place of ends": (GROUPED, named("offs", lambda x: x.diff(prepend=x[:1] * 0).int())),
    "ends one off": (GROUPED, named("offs", lambda x: torch.cat([x[:-1] - 1, x[-1:]]).clamp(min=0).int())),
    "ends of the next expert": (GROUPED, named("offs", lambda x: torch.cat([x[1:], x[-1:]]).int())),
    "ends of 64 bits": (GROUPED, named("offs", lambda x: x.long())),
    "weights turned over": (GROUPED, put(1, lambda x: x.flip(0))),
    "rows turned over": (GROUPED, put(0, lambda x: x.flip(0))),
    "another eps": (NORM, put(3, lambda x: 2 * x)),
    "a weight that is added to 1 here too": (NORM, put(2, lambda x: 1 + x)),
    "roots in place of their inverse": (NORM_GRAD, put(3, lambda x: 1 / x)),
    "the gradient without the weight": (NORM_GRAD, put(4, lambda x: torch.ones_like(x))),
    "rows and their gradient": (NORM_GRAD, swap(0, 1)),
}


def check() -> None:
    """All comparisons of ops with the reference."""
    for is_causal in (True, False):
        test_table.test_attention([5, 3, 8], is_causal)
    test_table.test_blocks([3, 4, 2])
    test_table.test_experts([3, 1, 4])
    test_table.test_rms_norm((3, 8))


def test_without_a_change_all_is_well() -> None:
    check()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_changed_argument_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    place, change = MUTANTS[name]
    module: Any = PLACES.get(place, tables.attention)
    real, calls = getattr(module, place), []

    def changed(*args: Any, **kwargs: Any) -> Any:
        own = list(args)
        change(own, kwargs)
        calls.append(name)
        return real(*own, **kwargs)

    monkeypatch.setattr(module, place, changed)
    with emulated(), pytest.raises((AssertionError, RuntimeError, IndexError)):
        check()
    assert calls, "the changed kernel was called"


def test_rows_that_a_kernel_leaves_unwritten_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated kernels leave NaN there, and the ops set them."""
    monkeypatch.setattr(varlen, "is_behind", lambda x, ends: torch.zeros(x.shape[0], dtype=torch.bool))
    with pytest.raises(AssertionError):
        test_table.test_attention([5, 3, 8], is_causal=False)
