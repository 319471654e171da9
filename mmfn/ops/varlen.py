"""Attention of packed rows by a pair of kernels for GPUs, whoever brings them: all segments in one call.

Kernels read the boundaries on the device; how long the longest segment is, which says how many blocks of queries are
started, comes from the copy of the boundaries on the host. So nothing waits. Rows behind the last boundary are what a
kernel leaves there, so they are set here.

Legend: T queries, S keys, H query heads, K kv heads, C channels, N segments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.errors import UserError
from mmfn.ops import flops
from mmfn.ops.attention import fake, fake_grad
from mmfn.ops.attention_block import check_block
from mmfn.ops.custom import Context, Operator, operator
from mmfn.ops.kernel import Kernel, Operators, Whole

DTYPES = (torch.bfloat16, torch.float16)
MAX_CHANNELS = 256
GRAD_ROWS = 128  # that the gradient's sums have for a segment beside its own: a block of queries


@dataclass(frozen=True, eq=False, kw_only=True)
class Varlen:
    """The entries of a table that a pair of kernels makes (`varlen`). `check(q_THC)` refuses what they lack."""

    forward: Operator
    backward: Operator
    operators: Operators
    attend: Callable[..., Tensor]
    check: Callable[[Tensor], None]

    def attention(self, q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, segments: Segments, *, is_causal: bool) -> Tensor:
        """`mmfn.ops.attention.attention`. Raises ValueError as that does and for what the kernels lack."""
        check_block(q_THC, k_SKC, v_SKC, segments, None, is_causal)
        self.check(q_THC)
        return self.attend(q_THC, k_SKC, v_SKC, segments.offsets_N, segments.host_N, is_causal, None, None)

    def attention_block(
        self,
        q_THC: Tensor,
        k_SKC: Tensor,
        v_SKC: Tensor,
        segments: Segments,
        keys: Segments | None = None,
        *,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """`mmfn.ops.attention_block.attention_block`; the log-sum-exp is float32. Errors as of `attention`."""
        check_block(q_THC, k_SKC, v_SKC, segments, keys, is_causal)
        self.check(q_THC)
        qkv = q_THC.detach(), k_SKC.detach(), v_SKC.detach()
        o_THC, lse_TH = self.forward(*qkv, segments.offsets_N, segments.host_N, is_causal, *_boundaries(keys))
        return o_THC, lse_TH

    def attention_block_grad(
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`mmfn.ops.attention_block.attention_block_grad`. Errors as of `attention`."""
        check_block(q_THC, k_SKC, v_SKC, segments, keys, is_causal)
        self.check(q_THC)
        tensors = do_THC, q_THC, k_SKC, v_SKC, o_THC.to(q_THC.dtype), lse_TH
        dq_THC, dk_SKC, dv_SKC = self.backward(
            *tensors, segments.offsets_N, segments.host_N, is_causal, *_boundaries(keys)
        )
        return dq_THC, dk_SKC, dv_SKC

    @property
    def kernels(self) -> dict[str, Any]:
        """The entries by name, each a `Kernel`."""
        results = (self.forward.name,)
        return {
            "attention": Kernel(self.attention, operators=self.operators, results=results),
            "attention_block": Kernel(self.attention_block, operators=self.operators, results=results),
            "attention_block_grad": Kernel(self.attention_block_grad, operators=self.operators),
        }


def varlen(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    check: Callable[[Tensor], None],
) -> Varlen:
    """Attention by two kernels, as the operators `name` and `name + "_grad"`.

    `forward(q_THC, k_SKC, v_SKC, *bounds, is_causal) -> (o_THC, lse_HT)` and `backward(do_THC, q_THC, k_SKC, v_SKC,
    o_THC, lse_HT, *bounds, is_causal) -> (dq_THC, dk_SKC, dv_SKC)`: scores times C**-0.5, the lse +inf without keys,
    rows of no segment left as they are; the gradients are those by the lse and output that are given. `bounds`: ends of
    queries and of keys, int32[N + 1] from 0 on the device, and the longest segment of each, at least 1. Both are the
    same with `is_causal`.
    """
    forward_operator = operator(name, _forward_body(forward), fake, is_whole=True)
    backward_operator = operator(f"{name}_grad", _backward_body(backward), fake_grad, is_whole=True)

    def gradient(ctx: Context, do_THC: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if do_THC is None:
            return (None,) * 8
        return *backward_operator(do_THC, *ctx.saved_tensors, ctx.settings, None, None), *(None,) * 5

    operators = {name: Whole(forward_operator.direct, _flops)}
    operators[backward_operator.name] = Whole(backward_operator.direct, _grad_flops)
    return Varlen(
        forward=forward_operator,
        backward=backward_operator,
        operators=flops.register(operators),
        attend=forward_operator.with_gradient(_save, gradient),
        check=check,
    )


def check_kernel(q_THC: Tensor, owner: str, cure: str) -> None:
    """Raise ValueError for a tensor of a GPU, or of a plan for one, that FlashAttention's kernels do not take.

    `owner`: whose attention it is; `cure`: what to do in place of it.
    """
    if q_THC.device.type == "cpu":  # where there is no kernel, but emulated ones
        return
    if q_THC.dtype not in DTYPES:
        raise UserError(
            f"attention of {owner} is made for bfloat16 and float16 but got {q_THC.dtype}; set "
            f"layout.compute_dtype=bfloat16, or {cure}"
        )
    if (channels := q_THC.shape[2]) % 8 or channels > MAX_CHANNELS:
        raise UserError(
            f"attention of {owner} takes heads of a multiple of 8 channels up to {MAX_CHANNELS} but these have "
            f"{channels}; {cure}"
        )


def _forward_body(kernel: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """What the operator runs: the kernel, and what is not its part. Without offsets keys lie where queries do."""

    def forward(
        q_THC: Tensor,
        k_SKC: Tensor,
        v_SKC: Tensor,
        offsets_N: Tensor,
        host_N: Tensor,
        is_causal: bool,
        key_offsets_N: Tensor | None,
        key_host_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        bounds = _bounds(offsets_N, host_N, key_offsets_N, key_host_N)
        if min(bounds[2:]) == 0:  # no query has a key
            o_THC, lse_TH = fake(q_THC)
            return o_THC.zero_(), lse_TH.fill_(-torch.inf)
        o_THC, lse_HT = kernel(*map(_rows, (q_THC, k_SKC, v_SKC)), *bounds, is_causal)
        is_behind_T1 = is_behind(q_THC, offsets_N)[:, None]
        is_alone_TH = is_behind_T1 | (lse_HT.t() == torch.inf)  # what the kernel says of a query without keys
        lse_TH = lse_HT.t().masked_fill(is_alone_TH, -torch.inf).contiguous()
        return o_THC.masked_fill_(is_behind_T1[..., None], 0), lse_TH

    return forward


def _backward_body(
    kernel: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The same of the gradient."""

    def backward(
        do_THC: Tensor,
        q_THC: Tensor,
        k_SKC: Tensor,
        v_SKC: Tensor,
        o_THC: Tensor,
        lse_TH: Tensor,
        offsets_N: Tensor,
        host_N: Tensor,
        is_causal: bool,
        key_offsets_N: Tensor | None,
        key_host_N: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        bounds = _bounds(offsets_N, host_N, key_offsets_N, key_host_N)
        if min(bounds[2:]) == 0:
            return torch.zeros_like(q_THC), torch.zeros_like(k_SKC), torch.zeros_like(v_SKC)
        tensors, lse_HT = map(_rows, (do_THC, q_THC, k_SKC, v_SKC, o_THC)), lse_TH.t().contiguous()
        dq_THC, dk_SKC, dv_SKC = kernel(*tensors, lse_HT, *bounds, is_causal)
        is_behind_S11 = is_behind(k_SKC, bounds[1])[:, None, None]
        dq_THC.masked_fill_(is_behind(q_THC, offsets_N)[:, None, None], 0)
        return dq_THC, dk_SKC.masked_fill_(is_behind_S11, 0), dv_SKC.masked_fill_(is_behind_S11, 0)

    return backward


def grad_workspace(q_THC: Tensor, k_SKC: Tensor, offsets_N: Tensor) -> list[Tensor]:
    """What FlashAttention's gradient holds, for a plan: sums of dq and of do * o in float32, with rows between
    segments, and where heads are grouped dk and dv of every query head. Source: `mha_varlen_bwd` of FlashAttention 2.
    """
    (T, H, C), S = q_THC.shape, k_SKC.shape[0]
    rows, multiple = T + GRAD_ROWS * (len(offsets_N) - 1), 32 if C <= 128 else 64
    widths = -(-C // multiple) * multiple, 1
    expanded = range(2 if k_SKC.shape[1] < H else 0)
    return [
        *(q_THC.new_empty(rows, H, width, dtype=torch.float32) for width in widths),
        *(k_SKC.new_empty(S, H, C) for _ in expanded),
    ]


def is_behind(x_THC: Tensor, offsets_N: Tensor) -> Tensor:
    """bool[T]: whether a row belongs to no segment."""
    return torch.arange(x_THC.shape[0], device=x_THC.device) >= offsets_N[-1]


def _boundaries(keys: Segments | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if keys is None else (keys.offsets_N, keys.host_N)


def _longest(host_N: Tensor) -> int:
    return int(host_N.diff().max()) if host_N.numel() > 1 else 0


def _rows(x_THC: Tensor) -> Tensor:
    """The kernel wants neighbouring channels; other strides are free."""
    return x_THC if x_THC.stride(-1) == 1 else x_THC.contiguous()


def _bounds(
    offsets_N: Tensor, host_N: Tensor, key_offsets_N: Tensor | None, key_host_N: Tensor | None
) -> tuple[Tensor, Tensor, int, int]:
    """Offsets of queries and keys, and the longest segment of each, as the kernel wants them."""
    longest = _longest(host_N)
    if key_offsets_N is None or key_host_N is None:
        return offsets_N, offsets_N, longest, longest
    return offsets_N, key_offsets_N, longest, _longest(key_host_N)


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, offsets_N, host_N, ctx.settings, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*qkv, *output, offsets_N, host_N)


def _flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    host_N: Tensor,
    is_causal: bool,
    keys: Any,
    key_host: Any,
    **_: Any,
) -> int:
    return flops.packed_attention(q, k, v, host_N, is_causal, key_host)


def _grad_flops(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, offsets: Tensor, host_N: Tensor,
    is_causal: bool, keys: Any, key_host: Any, **_: Any,
) -> int:  # fmt: skip
    return flops.packed_attention_grad(do, q, k, v, o, lse, host_N, is_causal, key_host)
