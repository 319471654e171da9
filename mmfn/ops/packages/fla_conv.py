"""The causal convolution by flash-linear-attention: its two halves, each one operator.

Legend: T tokens, D channels, K taps of the kernel, N segments.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.errors import UserError
from mmfn.ops import causal_conv1d as portable
from mmfn.ops.custom import Context, operator
from mmfn.ops.kernel import Kernel, Whole
from mmfn.ops.packages.fla_segments import Run, join, num_chunks, runs

MODULE = "fla.modules.causal_conv1d"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NOTHING: dict[str, Any] = {"bias": None, "residual": None, "initial_state": None}


def causal_conv1d(x_TD: Tensor, weight_DK: Tensor, segments: Segments) -> Tensor:
    """`mmfn.ops.causal_conv1d.causal_conv1d` by the package's kernels: bfloat16, float16 or float32.

    In float32, rounded once; the gradient reads what is before silu in x's dtype. Raises ValueError as that does and
    for another dtype.
    """
    portable.check(x_TD, weight_DK, segments)
    check_kernel(x_TD)
    y_TD: Tensor = _conv(x_TD, weight_DK, segments.offsets_N, segments.host_N)
    return y_TD


def check_kernel(x_TD: Tensor) -> None:
    """Raise ValueError for a tensor of a device, or of a plan for one, that the kernels do not take."""
    if x_TD.device.type != "cpu" and x_TD.dtype not in DTYPES:  # on a CPU are no kernels, but emulated ones
        raise UserError(
            f"causal_conv1d of fla is made for bfloat16, float16 and float32 but got {x_TD.dtype}; remove 'fla' from "
            "model.kernel_packages"
        )


def _arguments(run: Run) -> dict[str, Any]:
    own = {"activation": "silu", "cu_seqlens": run.offsets_N, "cu_seqlens_cpu": run.host_N}
    return {**NOTHING, **own, "chunk_indices": run.chunks()}


def _forward(x_TD: Tensor, weight_DK: Tensor, offsets_N: Tensor, host_N: Tensor) -> Tensor:
    outs = [
        import_module(MODULE).causal_conv1d_fwd(*run.of(x_TD), weight_DK.contiguous(), **_arguments(run))[0]
        for run in runs(offsets_N, host_N)
    ]
    return join(outs, len(x_TD)) if outs else torch.zeros_like(x_TD)


def _backward(
    dy_TD: Tensor, x_TD: Tensor, weight_DK: Tensor, offsets_N: Tensor, host_N: Tensor
) -> tuple[Tensor, Tensor]:
    for run in runs(offsets_N, host_N):  # one, as no state enters
        x_1LD, dy_1LD = run.of(x_TD, dy_TD)
        grads = import_module(MODULE).causal_conv1d_bwd(
            x=x_1LD, dy=dy_1LD, dht=None, weight=weight_DK.contiguous(), **_arguments(run)
        )
        return join([grads[0]], len(x_TD)), grads[1]
    return torch.zeros_like(x_TD), torch.zeros_like(weight_DK)


def _forward_held(x_TD: Tensor, weight_DK: Tensor, offsets_N: Tensor, host_N: Tensor) -> Tensor:
    return torch.empty_like(x_TD)


def _backward_held(
    dy_TD: Tensor, x_TD: Tensor, weight_DK: Tensor, offsets_N: Tensor, host_N: Tensor
) -> tuple[Tensor, Tensor]:
    """What is before silu, and a gradient of the weight for every chunk."""
    before = torch.empty_like(x_TD), weight_DK.new_empty(num_chunks(host_N), *weight_DK.shape, dtype=torch.float32)
    out = torch.empty_like(x_TD), torch.empty_like(weight_DK)
    del before
    return out


def _save(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Context, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    return *CONV_GRAD(dy_TD, *ctx.saved_tensors), None, None


CONV = operator(
    "mmfn::fla_causal_conv1d", _forward, lambda x, weight, offsets, host: x.new_empty(x.shape), is_whole=True
)
CONV_GRAD = operator(
    "mmfn::fla_causal_conv1d_grad",
    _backward,
    lambda dy, x, weight, offsets, host: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    is_whole=True,
)
_conv = CONV.with_gradient(_save, _gradient)
KERNEL = Kernel(
    causal_conv1d,
    operators={CONV.name: Whole(_forward_held), CONV_GRAD.name: Whole(_backward_held)},
    results=(CONV.name,),
)
