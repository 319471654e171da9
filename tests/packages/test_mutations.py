"""Single arguments of packages' functions, changed on their way: each change makes a comparison fail."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn.ops import Ops, reference
from tests.ops.delta_cases import check_close, draw, outcome, pack
from tests.packages.fakes import FUNCTIONS, installed
from tests.packages.table import laid_over

RULE, RULE_GRAD = "chunk_gated_delta_rule_fwd", "chunk_gated_delta_rule_bwd"
UNIT, UNIT_GRAD = "l2norm_fwd", "l2norm_bwd"
CONV, CONV_GRAD = "causal_conv1d_fwd", "causal_conv1d_bwd"
ATTEND, ATTEND_GRAD = "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"
Key = int | str
Change = Callable[[list[Any], dict[str, Any]], None]


def put(key: Key, change: Callable[[Any], Any]) -> Change:
    """Another value of one argument, by its place or name."""

    def run(args: list[Any], kwargs: dict[str, Any]) -> None:
        values: Any = args if isinstance(key, int) else kwargs
        values[key] = change(values[key])

    return run


def swap(a: Key, b: Key) -> Change:
    """Two arguments in each other's place."""

    def run(args: list[Any], kwargs: dict[str, Any]) -> None:
        values: Any = args if isinstance(a, int) else kwargs
        values[a], values[b] = values[b], values[a]

    return run


def shifted(ends: Tensor) -> Tensor:
    """Each inner boundary one later, where there is room."""
    return torch.cat([ends[:1], (ends[1:-1] + 1).minimum(ends[-1:]), ends[-1:]])


def lengths(ends: Tensor) -> Tensor:
    return ends.diff(prepend=ends[:1])


MUTANTS: dict[str, tuple[str, Change]] = {
    "rule: the scale is doubled": (RULE, put("scale", lambda x: 2 * x)),
    "rule: its scale left to a default of 1": (RULE, put("scale", lambda x: 1.0)),
    "rule: decays as they are, not their logarithms": (RULE, put("g", lambda x: x.exp())),
    "rule: the other sign of decays": (RULE, put("g", lambda x: -x)),
    "rule: beta before its sigmoid": (RULE, put("beta", lambda x: x.logit())),
    "rule: queries and keys": (RULE, swap("q", "k")),
    "rule: boundaries one off": (RULE, put("cu_seqlens", shifted)),
    "rule: lengths in place of ends": (RULE, put("cu_seqlens", lengths)),
    "rule: chunks of one segment": (RULE, put("chunk_indices", lambda x: torch.zeros_like(x))),
    "rule: chunks counted from 1": (RULE, put("chunk_indices", lambda x: x + 1)),
    "rule: no state enters": (RULE, put("initial_state", lambda x: None)),
    "rule: states turned": (RULE, put("initial_state", lambda x: None if x is None else x.mT)),
    "rule: no end states": (RULE, put("output_final_state", lambda x: False)),
    "rule grad: the scale is doubled": (RULE_GRAD, put("scale", lambda x: 2 * x)),
    "rule grad: decays in powers of e": (RULE_GRAD, put("g", lambda x: 0.693 * x)),
    "rule grad: inverses turned": (RULE_GRAD, put("A", lambda x: x.flip(-1))),
    "rule grad: no gradient of the end": (RULE_GRAD, put("dht", lambda x: None)),
    "rule grad: no state enters": (
        RULE_GRAD,
        put("initial_state", lambda x: None if x is None else torch.zeros_like(x)),
    ),
    "rule grad: boundaries one off": (RULE_GRAD, put("cu_seqlens", shifted)),
    "rule grad: values and their gradient": (RULE_GRAD, swap("v", "do")),
    "unit: another eps": (UNIT, put("eps", lambda x: 1e-2)),
    "unit grad: from what it was made of": (UNIT_GRAD, put(0, lambda x: 2 * x)),
    "unit grad: lengths, not inverted": (UNIT_GRAD, put(1, lambda x: 1 / x)),
    "convolution: no silu": (CONV, put("activation", lambda x: None)),
    "convolution: taps turned over": (CONV, put(1, lambda x: x.flip(1))),
    "convolution: boundaries one off": (CONV, put("cu_seqlens", shifted)),
    "convolution: boundaries on the host one off": (CONV, put("cu_seqlens_cpu", shifted)),
    "convolution grad: no silu": (CONV_GRAD, put("activation", lambda x: None)),
    "convolution grad: rows and their gradient": (CONV_GRAD, swap("x", "dy")),
    "convolution grad: boundaries one off": (CONV_GRAD, put("cu_seqlens", shifted)),
    "attention: the scale is doubled": (ATTEND, put("softmax_scale", lambda x: 2 * x)),
    "attention: causal or not": (ATTEND, put("causal", lambda x: not x)),
    "attention: boundaries of keys one off": (ATTEND, put(4, shifted)),
    "attention: lengths in place of ends": (ATTEND, put(3, lengths)),
    "attention: the longest segment one short": (ATTEND, put(5, lambda x: x - 1)),
    "attention: a window of one": (ATTEND, put("window_size_left", lambda x: 1)),
    "attention: scores are capped": (ATTEND, put("softcap", lambda x: 30.0)),
    "attention: dropout": (ATTEND, put("dropout_p", lambda x: 0.1)),
    "attention grad: the scale is doubled": (ATTEND_GRAD, put("softmax_scale", lambda x: 2 * x)),
    "attention grad: the output of the block": (ATTEND_GRAD, put(4, lambda x: 0 * x)),
    "attention grad: gradient and output": (ATTEND_GRAD, swap(0, 4)),
    "attention grad: log-sum-exp by tokens": (ATTEND_GRAD, put(5, lambda x: x.t().contiguous())),
    "attention grad: the log-sum-exp of the block": (ATTEND_GRAD, put(5, lambda x: x + 0.1)),
    "attention grad: gradients of keys and values": (ATTEND_GRAD, swap(7, 8)),
    "attention grad: causal or not": (ATTEND_GRAD, put("causal", lambda x: not x)),
    "attention grad: not deterministic": (ATTEND_GRAD, put("deterministic", lambda x: not x)),
}


def numbers(ops: Ops) -> list[list[Tensor]]:
    """What the entries give for a few segments: the rule, its pieces, the convolution, attention and its blocks."""
    segments, keys = pack([3, 0, 5]), pack([2, 1, 3])
    leaves, do = draw(10, (1, 2, 4, 4))
    rows, states = [x.detach() for x in leaves], torch.linspace(-1, 1, 64, dtype=torch.float64).view(2, 2, 4, 4)
    pieces = [
        ops.gated_delta_piece(*rows, segments, states[0]),
        *ops.gated_delta_piece_grad(do, *rows, segments, *states),
        ops.gated_delta_entry_grad(do, *rows[:2], *rows[3:], segments),
        ops.gated_delta_state(*rows[1:], segments),
    ]
    (q, k, v), dout = draw(10, (2, 2, 8, 8))[0][:3], draw(10, (1, 2, 8, 8))[1]
    x, taps = v[:, 0].detach().requires_grad_(), q[:8, 0, :4].detach().requires_grad_()
    o, lse = reference().attention_block(q[:8], k[:6], v[:6], segments, keys, is_causal=False)
    saved = dout[:8], q[:8].detach(), k[:6].detach(), v[:6].detach(), o.detach(), lse.detach() + 0.7
    return [
        outcome(ops.gated_delta_rule, leaves, do, segments),
        pieces,
        outcome(ops.causal_conv1d, [x, taps], dout[:, 0], segments),
        outcome(lambda *xs: ops.attention(*xs, segments, is_causal=True), [q, k, v], dout),
        list(ops.attention_block_grad(*saved, segments, keys, is_causal=False)),
    ]


def check() -> None:
    for found, wanted in zip(numbers(laid_over()), numbers(reference()), strict=True):
        check_close(found, wanted, 1e-11)


@contextmanager
def changed(name: str, change: Change, calls: list[str]) -> Iterator[None]:
    with installed() as modules:
        for module, functions in FUNCTIONS.items():
            if name in functions:

                def run(*args: Any, real: Any = functions[name], **kwargs: Any) -> Any:
                    own = list(args)
                    change(own, kwargs)
                    calls.append(name)
                    return real(*own, **kwargs)

                setattr(modules[module], name, run)
        yield


def test_without_a_change_all_is_well() -> None:
    with installed():
        check()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_changed_argument_is_found(name: str) -> None:
    function, change = MUTANTS[name]
    calls: list[str] = []
    with changed(function, change, calls), pytest.raises((AssertionError, RuntimeError, IndexError, AttributeError)):
        check()
    assert calls, "the changed function was called"
