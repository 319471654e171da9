"""Packed attention and its blocks by the FlashAttention kernels that torch has for GPUs: all segments in one call.

The kernel reads the boundaries on the device; how long the longest segment is, which says how many blocks of queries
are started, comes from the copy of the boundaries on the host. So nothing waits. Rows behind the last boundary are what
the kernel leaves there, so they are set here.

Legend: T queries, S keys, H query heads, K kv heads, C channels, N segments.
"""

from typing import Any

import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.errors import UserError
from mmfn.ops import flops
from mmfn.ops.attention import fake, fake_grad
from mmfn.ops.attention_block import check_block
from mmfn.ops.custom import Context, operator
from mmfn.ops.kernel import Kernel, Whole

DTYPES = (torch.bfloat16, torch.float16)
MAX_CHANNELS = 256

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


def attention(q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, segments: Segments, *, is_causal: bool) -> Tensor:
    """`mmfn.ops.attention.attention` on a GPU.

    bfloat16 or float16, C a multiple of 8 up to 256. Raises ValueError as that does and for what the kernel lacks.
    """
    check_block(q_THC, k_SKC, v_SKC, segments, None, is_causal)
    check_kernel(q_THC)
    o_THC: Tensor = _attend(q_THC, k_SKC, v_SKC, segments.offsets_N, segments.host_N, is_causal, None, None)
    return o_THC


def attention_block(
    q_THC: Tensor,
    k_SKC: Tensor,
    v_SKC: Tensor,
    segments: Segments,
    keys: Segments | None = None,
    *,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """`mmfn.ops.attention_block.attention_block` on a GPU; the log-sum-exp is float32. Errors as of `attention`."""
    check_block(q_THC, k_SKC, v_SKC, segments, keys, is_causal)
    check_kernel(q_THC)
    qkv = q_THC.detach(), k_SKC.detach(), v_SKC.detach()
    o_THC, lse_TH = ATTENTION(*qkv, segments.offsets_N, segments.host_N, is_causal, *_boundaries(keys))
    return o_THC, lse_TH


def attention_block_grad(
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
    """`mmfn.ops.attention_block.attention_block_grad` on a GPU. Errors as of `attention`."""
    check_block(q_THC, k_SKC, v_SKC, segments, keys, is_causal)
    check_kernel(q_THC)
    tensors = do_THC, q_THC, k_SKC, v_SKC, o_THC.to(q_THC.dtype), lse_TH
    dq_THC, dk_SKC, dv_SKC = ATTENTION_GRAD(
        *tensors, segments.offsets_N, segments.host_N, is_causal, *_boundaries(keys)
    )
    return dq_THC, dk_SKC, dv_SKC


def check_kernel(q_THC: Tensor) -> None:
    """Raise ValueError for a tensor of a GPU, or of a plan for one, that the kernel does not take."""
    if q_THC.device.type == "cpu":  # where there is no kernel, but emulated ones
        return
    if q_THC.dtype not in DTYPES:
        raise UserError(
            f"attention of the cuda table is made for bfloat16 and float16 but got {q_THC.dtype}; set "
            "layout.compute_dtype=bfloat16, or model.kernels=portable"
        )
    if (channels := q_THC.shape[2]) % 8 or channels > MAX_CHANNELS:
        raise UserError(
            f"attention of the cuda table takes heads of a multiple of 8 channels up to {MAX_CHANNELS} but these have "
            f"{channels}; use model.kernels=portable"
        )


def _boundaries(keys: Segments | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if keys is None else (keys.offsets_N, keys.host_N)


def _longest(host_N: Tensor) -> int:
    return int(host_N.diff().max()) if host_N.numel() > 1 else 0


def _is_behind(x_THC: Tensor, offsets_N: Tensor) -> Tensor:
    """bool[T]: whether a row belongs to no segment."""
    return torch.arange(x_THC.shape[0], device=x_THC.device) >= offsets_N[-1]


def _rows(x_THC: Tensor) -> Tensor:
    """The kernel wants neighbouring channels; other strides are free."""
    return x_THC if x_THC.stride(-1) == 1 else x_THC.contiguous()


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
    """Output and log-sum-exp; without `key_offsets_N` the keys lie where the queries do."""
    bounds = _bounds(offsets_N, host_N, key_offsets_N, key_host_N)
    if min(bounds[2:]) == 0:  # no query has a key
        o_THC, lse_TH = fake(q_THC)
        return o_THC.zero_(), lse_TH.fill_(-torch.inf)
    qkv, scale = map(_rows, (q_THC, k_SKC, v_SKC)), q_THC.shape[2] ** -0.5
    o_THC, lse_HT, *_ = _forward(*qkv, *bounds, 0.0, is_causal, False, scale=scale)
    is_behind_T1 = _is_behind(q_THC, offsets_N)[:, None]
    is_alone_TH = is_behind_T1 | (lse_HT.t() == torch.inf)  # what the kernel says of a query without keys
    return o_THC.masked_fill_(is_behind_T1[..., None], 0), lse_HT.t().masked_fill(is_alone_TH, -torch.inf).contiguous()


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
    """Gradients of q, k and v from that of the output."""
    bounds = _bounds(offsets_N, host_N, key_offsets_N, key_host_N)
    if min(bounds[2:]) == 0:
        return torch.zeros_like(q_THC), torch.zeros_like(k_SKC), torch.zeros_like(v_SKC)
    tensors, scale = map(_rows, (do_THC, q_THC, k_SKC, v_SKC, o_THC)), q_THC.shape[2] ** -0.5
    lse_HT, nothing = lse_TH.t().contiguous(), q_THC.new_empty(0)
    seed = torch.zeros(2, dtype=torch.uint64, device=q_THC.device)  # of dropout, of which there is none
    dq_THC, dk_SKC, dv_SKC = _backward(*tensors, lse_HT, *bounds, 0.0, is_causal, seed, nothing, scale=scale)
    is_behind_S11 = _is_behind(k_SKC, bounds[1])[:, None, None]
    dq_THC.masked_fill_(_is_behind(q_THC, offsets_N)[:, None, None], 0)
    return dq_THC, dk_SKC.masked_fill_(is_behind_S11, 0), dv_SKC.masked_fill_(is_behind_S11, 0)


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


def _gradient(ctx: Context, do_THC: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if do_THC is None:
        return (None,) * 8
    return *ATTENTION_GRAD(do_THC, *ctx.saved_tensors, ctx.settings, None, None), *(None,) * 5


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


ATTENTION = operator("mmfn::varlen_attention", forward, fake, is_whole=True)
ATTENTION_GRAD = operator("mmfn::varlen_attention_grad", backward, fake_grad, is_whole=True)
_attend = ATTENTION.with_gradient(_save, _gradient)

OPERATORS = flops.register(
    {ATTENTION.name: Whole(forward, _flops), ATTENTION_GRAD.name: Whole(backward, _grad_flops)},
)
KERNEL = Kernel(attention, operators=OPERATORS, results=(ATTENTION.name,))
BLOCK = Kernel(attention_block, operators=OPERATORS, results=(ATTENTION.name,))
BLOCK_GRAD = Kernel(attention_block_grad, operators=OPERATORS)
