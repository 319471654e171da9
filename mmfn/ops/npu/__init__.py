"""The table of ops for NPUs: torch_npu's operators where it has one that trains, the portable form for the rest.

No NPU has run this code: see docs/npu.md for what is proved of it, and what is not.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mmfn.errors import UserError
from mmfn.ops import Ops, portable
from mmfn.ops.cross_entropy import ACCELERATOR_BYTES
from mmfn.ops.kernel import Kernel
from mmfn.ops.npu import activation, attention, attention_block, dispatch, exchange, experts, norm, rotary
from mmfn.ops.npu.attention import Layout, Lengths
from mmfn.ops.npu.limits import LIMITS, Limits

PORTABLE = {
    "layer_norm": "torch's own operator has a kernel",
    "interpolate": "no operator adds up weighted rows of a table",
    "attention_cached": "torch's scaled_dot_product_attention, which torch_npu makes a fused operator of its own",
    "linear": "torch's own operator has a kernel",
    "route": "the operators that choose experts have no gradient, and leave the order of equal ones open",
    "gated_delta_rule": "the operator has no gradient; the package fla has kernels that train",
    "gated_delta_piece": "as gated_delta_rule",
    "gated_delta_piece_grad": "as gated_delta_rule",
    "gated_delta_entry_grad": "as gated_delta_rule",
    "gated_delta_state": "as gated_delta_rule",
    "gated_delta_step": "as gated_delta_rule",
    "causal_conv1d": "the operator that trains takes no packed rows; the package fla has one that does",
    "causal_conv1d_step": "as causal_conv1d",
    "linear_cross_entropy": "chunks of logits; the fused operators take neither weights nor z-loss",
}
"""Entries that are the portable table's, and why."""


def npu(
    *,
    layout: Layout = "TND",
    lengths: Lengths = "list",
    limits: Limits = LIMITS,
    name_of: Callable[[str], str] = exchange.hccl_name,
) -> Ops:
    """The table. `layout`, `lengths`: those of `mmfn.ops.npu.attention.attention`. `limits`: what operators take.

    `name_of`: the name of a process group to operators that exchange rows by themselves.

    `notes` say which entries are the portable ones, and why. Raises ValueError for a choice that there is not, and
    where torch_npu cannot be imported.
    """
    attention.check_choice(layout, lengths)
    load()

    def kernel(fn: Callable[..., Any], **declared: Any) -> Kernel:
        return Kernel(partial(fn, limits=limits), **declared)

    attend = partial(attention.attention, layout=layout, lengths=lengths)
    attending = {"operators": attention.OPERATORS, "results": attention.RESULTS}
    return replace(
        portable(cross_entropy="logits", logit_bytes=ACCELERATOR_BYTES),
        rms_norm=kernel(norm.rms_norm, operators=norm.OPERATORS),
        rms_norm_gated=kernel(norm.rms_norm_gated, operators=norm.OPERATORS),
        rotary=kernel(rotary.rotary, operators=rotary.OPERATORS),
        attention=kernel(attend, **attending),
        attention_block=kernel(attention_block.attention_block, **attending),
        attention_block_grad=kernel(attention_block.attention_block_grad, operators=attention.OPERATORS),
        swiglu=kernel(activation.swiglu, operators=activation.SWIGLU),
        gelu=kernel(activation.gelu, operators=activation.GELU),
        gelu_tanh=kernel(activation.gelu_tanh, operators=activation.GELU),
        dispatch=kernel(dispatch.dispatch, operators=dispatch.DISPATCH, results=dispatch.DISPATCHED),
        experts=kernel(experts.experts, operators=experts.OPERATORS, results=experts.RESULTS),
        combine=kernel(dispatch.combine, operators=dispatch.COMBINE, results=dispatch.COMBINED),
        experts_over_ranks=kernel(
            partial(exchange.experts_over_ranks, name_of=name_of),
            operators=exchange.OPERATORS,
            results=exchange.RESULTS,
        ),
        notes=tuple(f"{name} is the portable one: {reason}" for name, reason in PORTABLE.items()),
    )


def load() -> None:
    """Have torch_npu's operators in torch. Raises ValueError, with the fix, where they cannot be."""
    if "torch_npu" in sys.modules:
        return
    if find_spec("torch_npu") is None:
        raise UserError(
            "NPUs need torch_npu, which is not installed; pip install 'mmfn[npu]', or use model.kernels=portable"
        )
    try:
        import_module("torch_npu")
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"NPUs need torch_npu, which cannot be imported ({error}); source CANN's set_env.sh, or use 'portable'"
        ) from error
