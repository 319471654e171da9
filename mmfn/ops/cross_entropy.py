"""Cross entropy of a linear head whose logits are never held in full.

Supervised rows go through in chunks: a chunk's logits are written into one reused buffer, become their gradient in
place, and give their share of both gradients at once, in the forward; the backward only scales. So beside the
gradients themselves the op holds one chunk of logits, and rows without a label cost nothing. In bfloat16 on a CPU
another method is faster and holds no logits: `mmfn.ops.vocabulary_attention`.

Legend: T tokens, N supervised tokens (or those of one chunk), D width, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.batch import IGNORE
from mmfn.dtypes import wide
from mmfn.ops import flops
from mmfn.ops.custom import Context, operator
from mmfn.ops.eager import is_eager
from mmfn.ops.logit_chunks import (
    Gradients,
    add_head_grad_,
    aligned,
    exponentiate_,
    gradients_in_forward,
    input_grad,
    logits_,
    rows_of,
    smoothing,
    supervised,
)
from mmfn.ops.vocabulary_attention import QUERIES, attend

Method = Literal["logits", "attention", "attention_if_exact"]

CHUNK_BYTES = 160 * 2**20  # of float32 logits; smaller chunks read and write the head's gradient more often
MAX_CHUNK = 512  # rows; larger chunks are no faster
ACCELERATOR_BYTES = 8 * CHUNK_BYTES  # products of some thousand rows fill one: 2,048 of a vocabulary of 150,000
MAX_THREADS = 8  # for which attention has work


def linear_cross_entropy(
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
    method: Method = "logits",
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """`(loss, ce)` of a linear head: what is minimised, and the plain weighted cross entropy, which is a constant.

    `ce = sum_t weights_T[t] * (lse_t - logits_t[labels_T[t]])` over supervised tokens, where `logits_t = weight_VD @
    x_TD[t] + bias_V` and `lse = logsumexp`; `loss` counts a token `z_loss * lse_t^2` more, and with `label_smoothing`
    s its target is 1 - s at the label and s / V everywhere, as in torch. Without either the two are equal.

    A token is supervised if its label is not `IGNORE` and its weight is not 0; with none the sums are 0 and so are the
    gradients. `x_TD`, `weight_VD`, `bias_V`: one floating dtype. `labels_T`: int64[T] in [0, V) or `IGNORE`.
    `weights_T`: floating[T], a constant. Both results are float32[] (float64[] for float64). A gradient that is not
    needed is not computed. `num_labels`: 0-D int64 on the host, the number of supervised tokens; without it the host
    reads it of the device.

    `method`: "logits", whose gradients of head and bias are accumulated in float32 (or float64) and cast once;
    "attention" (`mmfn.ops.vocabulary_attention`: CPU, neither bias nor label smoothing), which holds no logits and
    rounds more often; or "attention_if_exact": attention for bfloat16 inputs that it takes, unless a weight is
    negative, and logits for all others. Which is faster depends on the machine, so a table chooses (`cpu_method`).
    `chunk`: rows of logits held at a time, by default `chunk_rows(V, chunk_bytes)`; with attention, rows that meet the
    head at a time, by default and at most 2,048.

    Raises ValueError for shapes, dtypes, labels or settings that do not fit. Source: chunked gradients in the forward
    as in Hsu et al. 2024, "Liger kernel" (arXiv:2410.10989); z-loss: Chowdhery et al. 2022, "PaLM" (arXiv:2204.02311),
    section 5; label smoothing: `torch.nn.functional.cross_entropy`.
    """
    check_head(x_TD, weight_VD, bias_V, labels_T, weights_T)
    check_settings(z_loss, label_smoothing, chunk)
    method = _applicable(method, x_TD, bias_V, label_smoothing)
    rows = chunk or (0 if method != "logits" else chunk_rows(weight_VD.shape[0], chunk_bytes))  # 0: attention's own
    needs = needed(x_TD, weight_VD, bias_V)
    if is_eager(x_TD):
        compute = partial(
            _compute,
            labels_T=labels_T,
            weights_T=weights_T,
            num_labels=num_labels,
            rows=rows,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            method=method,
            needs=needs,
        )
        loss, ce = gradients_in_forward(compute, x_TD, weight_VD, bias_V)
    else:
        settings = (rows, z_loss, label_smoothing, method)
        loss, ce, *_ = LOSS.traced(x_TD, weight_VD, bias_V, labels_T, weights_T, num_labels, *settings, needs)
    return loss, ce


def linear_cross_entropy_reference(
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
    method: Method = "logits",
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` with all logits at once, in float32 or float64 behind the head.

    `chunk`, `num_labels` and `method` change nothing. Legend: N supervised tokens.
    """
    is_supervised_T = (labels_T != IGNORE) & (weights_T != 0)
    labels_N, weights_N = labels_T[is_supervised_T], weights_T[is_supervised_T].to(wide(x_TD.dtype))
    logits_NV = F.linear(x_TD[is_supervised_T], weight_VD, bias_V).to(wide(x_TD.dtype))
    lse_N = logits_NV.logsumexp(-1)
    ce_N = lse_N - logits_NV.gather(-1, labels_N[:, None])[:, 0]
    uniform_N = lse_N - logits_NV.mean(-1)
    losses_N = (1 - label_smoothing) * ce_N + label_smoothing * uniform_N + z_loss * lse_N.square()
    return (losses_N * weights_N).sum(), (ce_N * weights_N).sum().detach()


def chunk_rows(num_vocabulary: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows per chunk: the largest power of two whose float32 logits fit the bytes, from 1 to `MAX_CHUNK` for
    `CHUNK_BYTES`, and likewise more for more bytes."""
    rows = power_of_two(max(1, chunk_bytes // (4 * num_vocabulary)))
    return min(MAX_CHUNK * chunk_bytes // CHUNK_BYTES, rows)


def power_of_two(most: int) -> int:
    """The largest power of two that is at most `most`."""
    return 1 << (most.bit_length() - 1)


def needed(x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> list[bool]:
    """Which gradients are: those of x, head and bias."""
    leaves = (x_TD, weight_VD, bias_V)
    return [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]


def check_head(x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor, weights_T: Tensor) -> None:
    """Raise ValueError for tensors that do not fit together."""
    if x_TD.ndim != 2 or weight_VD.ndim != 2 or x_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"x_TD {tuple(x_TD.shape)} and weight_VD {tuple(weight_VD.shape)} must be [T, D] and [V, D] with one D"
        )
    if x_TD.dtype != weight_VD.dtype or not x_TD.is_floating_point():
        raise ValueError(f"x_TD is {x_TD.dtype} and weight_VD {weight_VD.dtype}; cast both to one floating dtype")
    if bias_V is not None and (bias_V.shape != weight_VD.shape[:1] or bias_V.dtype != weight_VD.dtype):
        raise ValueError(
            f"bias_V is {bias_V.dtype}{list(bias_V.shape)} but the head {weight_VD.dtype}{list(weight_VD.shape)}; give "
            "one value for each of its rows, in its dtype"
        )
    for name, given in (("labels_T", labels_T), ("weights_T", weights_T)):
        if given.shape != x_TD.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(given.shape)} but x_TD has {x_TD.shape[0]} rows; give one each")
    if labels_T.dtype != torch.int64:
        raise ValueError(f"labels_T is {labels_T.dtype} but must be int64; cast it")
    if weights_T.requires_grad or not weights_T.is_floating_point():
        raise ValueError(f"weights_T ({weights_T.dtype}) must be floating-point and a constant; cast or detach it")


def check_settings(z_loss: float, label_smoothing: float, chunk: int | None) -> None:
    """Raise ValueError for a setting out of range."""
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss is {z_loss} but must be a finite number of at least 0; 1e-4 is usual")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing} but must lie in [0, 1]; 0.1 is usual")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk} but must be at least 1 row; leave it out for the default")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a table may be made inside a graph
def cpu_method() -> tuple[Method, str]:
    """The faster method on this machine's CPU for bfloat16, and why: what a table chooses when it is made.

    The kernel of attention is fast with AVX-512, mostly with AMX; without MKL its products are rounded, too; and its
    tasks are few: of many threads most would idle.
    """
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    machine = f"{capability}, {'MKL' if has_mkl else 'no MKL'}, {threads} thread{'s' if threads > 1 else ''}"
    is_faster = capability == "AVX512" and has_mkl and threads <= MAX_THREADS
    return ("attention_if_exact" if is_faster else "logits"), machine


def _applicable(method: Method, x_TD: Tensor, bias_V: Tensor | None, label_smoothing: float) -> Method:
    """The method, "logits" where "attention_if_exact" does not apply. The signs of weights are looked at later.

    Raises ValueError for one that is unknown, or that these inputs cannot have.
    """
    can_attend = x_TD.device.type == "cpu" and bias_V is None and not label_smoothing
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r} but must be one of {', '.join(map(repr, get_args(Method)))}")
    if method == "attention" and not can_attend:
        raise ValueError(
            f"method 'attention' is for CPU tensors without bias or label smoothing but x_TD is on {x_TD.device}, a "
            f"bias is {'missing' if bias_V is None else 'given'} and label_smoothing {label_smoothing}; use 'logits'"
        )
    if method == "attention_if_exact" and not (can_attend and x_TD.dtype == torch.bfloat16):
        return "logits"
    return method


def _compute(
    x_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    labels_T: Tensor,
    weights_T: Tensor,
    num_labels: Tensor | None,
    rows: int,
    z_loss: float,
    label_smoothing: float,
    method: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Gradients]:
    """The two losses and the gradients of the first, those asked for."""
    V, dtype = weight_VD.shape[0], wide(x_TD.dtype)
    index_N = supervised(labels_T, weights_T, V, num_labels)
    labels_N, weights_N = labels_T[index_N], weights_T[index_N].to(dtype)
    if method == "attention" or (method == "attention_if_exact" and not bool((weights_N < 0).any())):
        return _by_attention(x_TD, weight_VD, index_N, labels_N, weights_N, z_loss, rows or QUERIES, needs)
    N = index_N.numel()
    rows = -(-N // max(1, -(-N // (rows or chunk_rows(V)))))  # chunks of even size
    smooth = None
    if label_smoothing:
        smooth = smoothing(x_TD, weight_VD, bias_V, index_N, weights_N, share=label_smoothing / V)
    buffer = x_TD.new_empty(V * aligned(rows), dtype=dtype)
    losses_N, ce_N = torch.empty_like(weights_N), torch.empty_like(weights_N)
    dx_TD = torch.zeros_like(x_TD) if needs[0] else None
    dw_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs[1] else None
    db_V = weight_VD.new_zeros(V, dtype=dtype) if needs[2] else None
    for start in range(0, N, max(1, rows)):
        part = slice(start, start + rows)
        index = index_N[part]
        n = index.numel()
        pad = aligned(n) - n  # zero rows of weight 0, which add exactly nothing
        x_ND, grad_VN = F.pad(x_TD[index], (0, 0, 0, pad)), buffer[: V * (n + pad)].view(V, -1)
        logits_(grad_VN, weight_VD, x_ND, bias_V)
        label_1N = F.pad(labels_N[part], (0, pad))[None]
        max_N = grad_VN.amax(0)
        label_N = grad_VN.gather(0, label_1N)[0] - max_N
        row = rows_of(max_N, exponentiate_(grad_VN, max_N), label_N, z_loss, label_smoothing)
        grad_VN.scatter_(0, label_1N, (label_N.exp() - row.pull_N)[None])
        losses_N[part], ce_N[part] = row.losses_N[:n], row.ce_N[:n]
        scale_N = F.pad(weights_N[part], (0, pad)) * row.scale_N
        if dx_TD is not None:
            dx_ND = input_grad(weight_VD, grad_VN, scale_N)[:n]
            if smooth is not None:
                dx_ND.addr_(weights_N[part], smooth.x_D)
            dx_TD[index] = dx_ND.to(x_TD.dtype)
        if db_V is not None:
            db_V += grad_VN @ scale_N
        if dw_VD is not None:
            add_head_grad_(dw_VD, grad_VN, x_ND, scale_N)
    loss, ce = (losses_N * weights_N).sum(), (ce_N * weights_N).sum()
    if smooth is not None:
        loss += smooth.loss
        add_to_all_(dw_VD, smooth.row_D)
        add_to_all_(db_V, smooth.bias)
    return loss, ce, (dx_TD, narrow(dw_VD, weight_VD), narrow(db_V, weight_VD))


def _by_attention(
    x_TD: Tensor,
    weight_VD: Tensor,
    index_N: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    z_loss: float,
    rows: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Gradients]:
    """`_compute` without logits, of the supervised tokens `index_N`; nobody needs the gradient of a bias."""
    losses_N, ce_N, dx_ND, dw_VD = attend(
        x_TD[index_N], weight_VD, labels_N, weights_N, z_loss=z_loss, rows=rows, needs=needs
    )
    dx_TD = None if dx_ND is None else torch.zeros_like(x_TD).index_copy_(0, index_N, dx_ND)
    return (losses_N * weights_N).sum(), (ce_N * weights_N).sum(), (dx_TD, dw_VD, None)


def add_to_all_(grad: Tensor | None, shared: Tensor) -> None:
    """Add what all rows share to a gradient, where there is one."""
    if grad is not None:
        grad += shared


def narrow(grad: Tensor | None, leaf: Tensor) -> Tensor | None:
    """A gradient in the dtype of its leaf."""
    return None if grad is None else grad.to(leaf.dtype)


def _flat(
    x_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_T: Tensor,
    weights_T: Tensor,
    num_labels: Tensor | None,
    rows: int,
    z_loss: float,
    label_smoothing: float,
    method: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_compute` as an operator wants it: a gradient that was not asked for comes back empty."""
    loss, ce, grads = _compute(
        x_TD,
        weight_VD,
        bias_V,
        labels_T=labels_T,
        weights_T=weights_T,
        num_labels=num_labels,
        rows=rows,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        method=method,
        needs=needs,
    )
    dx_TD, dw_VD, db_V = (x_TD.new_empty(0) if grad is None else grad for grad in grads)
    return loss, ce, dx_TD, dw_VD, db_V


def _fake(
    x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    leaves = zip((x_TD, weight_VD, bias_V), inputs[-1], strict=True)
    dx_TD, dw_VD, db_V = (
        torch.empty_like(leaf) if leaf is not None and is_needed else x_TD.new_empty(0) for leaf, is_needed in leaves
    )
    loss = x_TD.new_empty((), dtype=wide(x_TD.dtype))
    return loss, torch.empty_like(loss), dx_TD, dw_VD, db_V


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])
    ctx.settings = inputs[-1]


def _gradient(ctx: Context, dloss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 11
    saved = zip(ctx.saved_tensors, ctx.settings, strict=True)
    return *(grad * dloss if is_needed else None for grad, is_needed in saved), *(None,) * 8


LOSS = operator("mmfn::linear_cross_entropy", _flat, _fake)
LOSS.with_gradient(_save, _gradient)  # of the operator; in eager execution gradients are scaled in place instead


def _flops(
    x_TD: Tensor, weight_VD: Tensor, bias: Tensor | None, labels_T: Tensor, weights_T: Tensor, *settings: Any, **_: Any
) -> int:
    """Of the operator: a product for the logits and one for each gradient; by attention without the labels' own rows,
    one more for what each gradient's mean is divided by."""
    method, needs = settings[-2:]
    num_supervised = int(((labels_T != IGNORE) & (weights_T != 0)).sum())
    products: int = 1 + sum(needs[:2]) if method == "logits" else 2 + 2 * needs[1]
    return 2 * num_supervised * weight_VD.numel() * products


OPERATORS = flops.register({"mmfn::linear_cross_entropy": _flops})
