"""The ops table: every primitive and hook a model calls, as one frozen dataclass of pure functions.

`reference()` is slow and obvious, for any dtype: the oracle. `portable()` is fast plain torch: the CPU default. Both
have the same signatures; `dataclasses.replace(table, attention=Kernel(mine, ...))` swaps one entry (`mmfn.ops.kernel`:
an op declares what selective remat and plans must know of it). Hooks (`gather`, `gather_head`,
`layer`, `stack`, `place_features`, `kept`, `psum`, `experts_over_ranks`) are what transforms of a program wrap or call;
they have base forms.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.errors import UserError
from mmfn.ops import (
    activation,
    attention,
    attention_block,
    causal_conv1d,
    dispatch,
    exchange,
    experts,
    gated_delta_piece,
    gated_delta_rule,
    interpolate,
    linear,
    norm,
    rotary,
    route,
)
from mmfn.ops.cross_entropy import (
    ACCELERATOR_BYTES,
    CHUNK_BYTES,
    OPERATORS,
    Method,
    cpu_method,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from mmfn.ops.kernel import Kernel
from mmfn.tree import Tree


class Attention(Protocol):
    """Packed self-attention within segments; see `mmfn.ops.attention.attention`."""

    def __call__(
        self, q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, segments: Segments, *, is_causal: bool
    ) -> Tensor: ...


class AttentionBlock(Protocol):
    """Output and log-sum-exp over some of the keys; see `mmfn.ops.attention_block.attention_block`."""

    def __call__(
        self,
        q_THC: Tensor,
        k_SKC: Tensor,
        v_SKC: Tensor,
        segments: Segments,
        keys: Segments | None = None,
        *,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor]: ...


class AttentionBlockGrad(Protocol):
    """Gradients of a block; see `mmfn.ops.attention_block.attention_block_grad`."""

    def __call__(
        self,
        do_THC: Tensor,
        q_THC: Tensor,
        k_SKC: Tensor,
        v_SKC: Tensor,
        o_THC: Tensor,
        lse_TH: Tensor,
        segments: Segments,
        keys: Segments | None = None,
        *,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class GatedDeltaRule(Protocol):
    """A recurrence within segments; see `mmfn.ops.gated_delta_rule.gated_delta_rule`."""

    def __call__(
        self, q_TKC: Tensor, k_TKC: Tensor, v_THV: Tensor, g_TH: Tensor, beta_TH: Tensor, segments: Segments
    ) -> Tensor: ...


class GatedDeltaState(Protocol):
    """Its states behind segments; see `mmfn.ops.gated_delta_rule.gated_delta_state`."""

    def __call__(
        self,
        k_TKC: Tensor,
        v_THV: Tensor,
        g_TH: Tensor,
        beta_TH: Tensor,
        segments: Segments,
        state_NHCV: Tensor | None = None,
    ) -> Tensor: ...


class Route(Protocol):
    """Experts of every token and their weights; see `mmfn.ops.route.route`."""

    def __call__(
        self, logits_TE: Tensor, cfg: route.RouteConfig, bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class CrossEntropy(Protocol):
    """Weighted sums of token losses of a linear head; see `mmfn.ops.cross_entropy.linear_cross_entropy`."""

    def __call__(
        self,
        x_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        *,
        bias_V: Tensor | None = None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        chunk: int | None = None,
        num_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


Block = Callable[..., tuple[Tensor, Any]]  # (params, x, *xs) -> (x, out)
Between = Callable[[Tensor], tuple[Tensor, Any]]  # x behind a block -> (x of the next one, what is tapped)


def call_layer(block: Block, params: Tree, *xs: Any) -> tuple[Tensor, Any]:
    """Base of the `layer` hook: call the block. Transforms wrap it (remat, regional compile, offload)."""
    return block(params, *xs)


def run_stack(
    run: Callable[..., tuple[Tensor, Any]],
    block: Block,
    layers: Sequence[Tree],
    x: Tensor,
    *xs: Any,
    name: str = "",
    each: Sequence[Any] = (),
    between: Mapping[int, Between] | None = None,
) -> tuple[Tensor, list[Any], dict[int, Any]]:
    """Base of the `stack` hook: a scan of `block` over `layers`; the last x, every layer's second output, and taps.

    `run` is `ops.layer`. `xs` go to every layer; `each[i]`, if given, to layer i alone, last. `between[i](x)`, where
    there is one, runs outside the block behind layer i and gives the next layer's x, and what comes back under i as a
    tap. `name` tells transforms which stack it is: that of the parameters' path.
    """
    outs, taps, between = [], {}, between or {}
    for i, params in enumerate(layers):
        own = (each[i],) if each else ()
        x, out = run(block, params, x, *xs, *own)
        outs.append(out)
        if i in between:
            x, taps[i] = between[i](x)
    return x, outs, taps


def place_features(features_ND: Tensor, index_T: Tensor) -> Tensor:
    """`x_TD[t] = features_ND[index_T[t]]`, and zeros where `index_T[t]` is -1 (tokens without a feature)."""
    zero = features_ND.new_zeros(1, features_ND.shape[1])
    return torch.cat([zero, features_ND]).index_select(0, index_T + 1)


def keep_all(counts_E: Tensor, num_rows: int) -> Tensor:
    """Base of the `kept` hook: of `counts_E` routed rows among `num_rows`, how many `experts` computes: all of them."""
    return counts_E


def identity(x: Any) -> Any:
    """Base of the `gather`, `gather_head` and `psum` hooks on one device."""
    return x


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The table. Signatures and shapes are in the docstrings of the functions the tables are built from."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rms_norm_gated: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    interpolate: Callable[[Tensor, Tensor, Tensor], Tensor]
    attention: Attention
    attention_block: AttentionBlock
    attention_block_grad: AttentionBlockGrad
    attention_cached: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    gated_delta_rule: GatedDeltaRule
    gated_delta_piece: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Segments, Tensor], Tensor]
    gated_delta_piece_grad: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    gated_delta_entry_grad: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Segments], Tensor]
    gated_delta_state: GatedDeltaState
    gated_delta_step: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    causal_conv1d: Callable[[Tensor, Tensor, Segments], Tensor]
    causal_conv1d_step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    gelu: Callable[[Tensor], Tensor]
    gelu_tanh: Callable[[Tensor], Tensor]
    route: Route
    dispatch: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    experts: Callable[[Tensor, Tensor, Tree], Tensor]
    combine: Callable[[Tensor, Tensor, Tensor], Tensor]
    linear_cross_entropy: CrossEntropy
    gather: Callable[[Tree], Tree] = identity
    gather_head: Callable[[Tree], Tree] = identity
    layer: Callable[..., tuple[Tensor, Any]] = call_layer
    stack: Callable[..., tuple[Tensor, list[Any], dict[int, Any]]] = run_stack
    place_features: Callable[[Tensor, Tensor], Tensor] = place_features
    kept: Callable[[Tensor, int], Tensor] = keep_all
    psum: Callable[[Tensor], Tensor] = identity
    experts_over_ranks: exchange.ExpertsOverRanks = exchange.KERNEL
    logit_bytes: int = CHUNK_BYTES  # of float32 logits that its loss holds at a time
    notes: tuple[str, ...] = ()  # what was chosen when the table was made, and why


def kernels(ops: Ops) -> dict[str, Callable[..., Any]]:
    """The entries that are ops, by name: those without a base form. Each is a `Kernel`, or was put in bare."""
    return {f.name: getattr(ops, f.name) for f in fields(ops) if f.default is MISSING}


def reference() -> Ops:
    """Slow and obvious in any dtype: what every other table is tested against."""
    return Ops(
        rms_norm=Kernel(norm.rms_norm_reference),
        rms_norm_gated=Kernel(norm.rms_norm_gated_reference),
        layer_norm=Kernel(norm.layer_norm_reference),
        rotary=Kernel(rotary.rotary_reference),
        interpolate=Kernel(interpolate.interpolate_reference),
        attention=Kernel(attention.attention_reference),
        attention_block=Kernel(attention_block.attention_block_reference),
        attention_block_grad=Kernel(attention_block.attention_block_grad_reference),
        attention_cached=Kernel(attention.attention_cached_reference),
        gated_delta_rule=Kernel(gated_delta_rule.gated_delta_rule_reference),
        gated_delta_piece=Kernel(gated_delta_piece.gated_delta_piece_reference),
        gated_delta_piece_grad=Kernel(gated_delta_piece.gated_delta_piece_grad_reference),
        gated_delta_entry_grad=Kernel(gated_delta_piece.gated_delta_entry_grad_reference),
        gated_delta_state=Kernel(gated_delta_rule.gated_delta_state_reference),
        gated_delta_step=Kernel(gated_delta_rule.gated_delta_step_reference),
        causal_conv1d=Kernel(causal_conv1d.causal_conv1d_reference),
        causal_conv1d_step=Kernel(causal_conv1d.causal_conv1d_step_reference),
        linear=Kernel(linear.linear_reference),
        swiglu=Kernel(activation.swiglu_reference),
        gelu=Kernel(activation.gelu_reference),
        gelu_tanh=Kernel(activation.gelu_tanh_reference),
        route=Kernel(route.route_reference),
        dispatch=Kernel(dispatch.dispatch_reference),
        experts=Kernel(experts.experts_reference),
        combine=Kernel(dispatch.combine_reference),
        linear_cross_entropy=Kernel(linear_cross_entropy_reference),
    )


def portable(*, cross_entropy: str = "auto", logit_bytes: int = CHUNK_BYTES) -> Ops:
    """Fast plain torch, the CPU default.

    `cross_entropy`: the method of `linear_cross_entropy` for bfloat16 on a CPU, "logits" or "attention", or "auto": the
    faster one on this machine (`mmfn.ops.cross_entropy.cpu_method`). `notes` say which and why. All else takes logits,
    `logit_bytes` of them at a time. Raises ValueError for another method.
    """
    methods: dict[str, tuple[Method, str]] = {
        "auto": cpu_method(),
        "logits": ("logits", "as asked for"),
        "attention": ("attention_if_exact", "as asked for"),
    }
    if cross_entropy not in methods:
        raise UserError(f"cross_entropy is {cross_entropy!r} but must be one of {', '.join(methods)}")
    method, reason = methods[cross_entropy]
    name = "logits" if method == "logits" else "attention over the vocabulary"
    return Ops(
        rms_norm=Kernel(norm.rms_norm),
        rms_norm_gated=Kernel(norm.rms_norm_gated),
        layer_norm=Kernel(norm.layer_norm),
        rotary=Kernel(rotary.rotary),
        interpolate=interpolate.KERNEL,
        attention=attention.KERNEL,
        attention_block=attention_block.KERNEL,
        attention_block_grad=attention_block.GRAD_KERNEL,
        attention_cached=Kernel(attention.attention_cached),
        gated_delta_rule=gated_delta_rule.KERNEL,
        gated_delta_piece=gated_delta_piece.KERNEL,
        gated_delta_piece_grad=gated_delta_piece.GRAD_KERNEL,
        gated_delta_entry_grad=gated_delta_piece.ENTRY_GRAD_KERNEL,
        gated_delta_state=gated_delta_rule.STATE_KERNEL,
        gated_delta_step=Kernel(gated_delta_rule.gated_delta_step),
        causal_conv1d=causal_conv1d.KERNEL,
        causal_conv1d_step=Kernel(causal_conv1d.causal_conv1d_step),
        linear=linear.KERNEL,
        swiglu=Kernel(activation.swiglu),
        gelu=Kernel(activation.gelu),
        gelu_tanh=Kernel(activation.gelu_tanh),
        route=Kernel(route.route),
        dispatch=dispatch.DISPATCH,
        experts=experts.KERNEL,
        combine=dispatch.COMBINE,
        linear_cross_entropy=Kernel(
            partial(linear_cross_entropy, method=method, chunk_bytes=logit_bytes), operators=OPERATORS
        ),
        experts_over_ranks=exchange.KERNEL,  # the default, which a graph that makes the table has no name for
        logit_bytes=logit_bytes,
        notes=(f"cross entropy of bfloat16 on a CPU by {name} ({reason})",),
    )


def _cuda() -> Ops:
    """The table for GPUs, a module of its own likewise."""
    from mmfn.ops.cuda import cuda

    return cuda()


def _npu() -> Ops:
    """The table for NPUs; a module of its own, which nobody else reads."""
    from mmfn.ops.npu import npu

    return npu()


TABLES: Mapping[str, Callable[[], Ops]] = {
    "portable": portable,
    "reference": reference,
    "cuda": _cuda,
    "npu": _npu,
}
"""Name of a table -> the function that makes it."""


def planned_table(name: str, *, is_compiled: bool = False) -> Ops:
    """The table that a plan takes for the one of a name.

    Operators of NPUs are only where torch_npu is, so theirs is planned as the portable one, with an accelerator's
    chunks of logits. `is_compiled`: of blocks that a compiler will fuse; what the table for GPUs leaves to it there is
    planned as the portable one too.
    """
    if name == "cuda" and is_compiled:
        return replace(table(name), rms_norm=Kernel(norm.rms_norm))
    return portable(cross_entropy="logits", logit_bytes=ACCELERATOR_BYTES) if name == "npu" else table(name)


def table(name: str) -> Ops:
    """The table of a name in `TABLES`, made for this machine: `table("portable")`.

    What depends on the machine (its vector units, threads) is chosen here, once, and told in `notes`; the ops depend on
    their arguments alone. Raises ValueError for another name, and for one that this machine cannot have.
    """
    if name not in TABLES:
        raise UserError(f"{name!r} is no table of ops; use one of {', '.join(map(repr, TABLES))}")
    return TABLES[name]()
