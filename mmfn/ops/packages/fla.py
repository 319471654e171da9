"""flash-linear-attention: the gated delta rule, its pieces and states, and its convolution, on GPUs and on NPUs.

They are Triton kernels, on NPUs those of its Ascend back end. Tokens behind the last segment are not given to the
package; output and gradients are zero there. Nothing waits: boundaries and chunks are on the device, and how many
chunks there are comes from the copy of the boundaries on the host.

Legend: T tokens, K heads of queries and keys, H of values, C key channels, V value channels, N segments.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mmfn.batch import Segments
from mmfn.errors import UserError
from mmfn.ops.gated_delta_piece import check_piece
from mmfn.ops.gated_delta_rule import check_inputs, check_state
from mmfn.ops.kernel import Kernel
from mmfn.ops.packages import fla_conv, fla_rule
from mmfn.ops.packages.package import Package, Refusal, Span

DTYPES = (torch.bfloat16, torch.float16)
MAX_CHANNELS = 256


def gated_delta_rule(
    q_TKC: Tensor, k_TKC: Tensor, v_THV: Tensor, g_TH: Tensor, beta_TH: Tensor, segments: Segments
) -> Tensor:
    """`mmfn.ops.gated_delta_rule.gated_delta_rule` by the package: bfloat16 or float16, C even and at most 256, V even.

    Products are in that dtype with float32 sums, q and k of unit length rounded to it. Raises ValueError as that does
    and for what the kernels lack; so do the others.
    """
    check_inputs(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments)
    check_kernel(k_TKC, v_THV)
    bounds = segments.offsets_N, segments.host_N
    o_THV: Tensor = fla_rule.rule(q_TKC, k_TKC, v_THV, g_TH, beta_TH, *bounds, None)
    return o_THV


def gated_delta_piece(
    q_TKC: Tensor,
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    segments: Segments,
    state_HCV: Tensor,
) -> Tensor:
    """`mmfn.ops.gated_delta_piece.gated_delta_piece` by the package."""
    check_piece(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments, state_HCV)
    check_kernel(k_TKC, v_THV)
    rows = (x.detach() for x in (q_TKC, k_TKC, v_THV, g_TH, beta_TH))
    o_THV: Tensor = fla_rule.RULE(*rows, segments.offsets_N, segments.host_N, state_HCV)[0]
    return o_THV


def gated_delta_piece_grad(
    do_THV: Tensor,
    q_TKC: Tensor,
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    segments: Segments,
    state_HCV: Tensor,
    dend_HCV: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`mmfn.ops.gated_delta_piece.gated_delta_piece_grad` by the package, its forward computed again."""
    check_piece(q_TKC, k_TKC, v_THV, g_TH, beta_TH, segments, state_HCV, dend_HCV)
    check_kernel(k_TKC, v_THV)
    rows, bounds = (q_TKC, k_TKC, v_THV, g_TH, beta_TH), (segments.offsets_N, segments.host_N)
    dq, dk, dv, dg, dbeta = fla_rule.RULE_GRAD(do_THV, *rows, None, None, *bounds, state_HCV, dend_HCV)
    return dq, dk, dv, dg, dbeta


def gated_delta_entry_grad(
    do_THV: Tensor, q_TKC: Tensor, k_TKC: Tensor, g_TH: Tensor, beta_TH: Tensor, segments: Segments
) -> Tensor:
    """`mmfn.ops.gated_delta_piece.gated_delta_entry_grad` by the package, with values of zero."""
    check_inputs(q_TKC, k_TKC, do_THV, g_TH, beta_TH, segments)
    check_kernel(k_TKC, do_THV)
    dstate_HCV: Tensor = fla_rule.ENTRY_GRAD(do_THV, q_TKC, k_TKC, g_TH, beta_TH, segments.offsets_N, segments.host_N)
    return dstate_HCV


def gated_delta_state(
    k_TKC: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    segments: Segments,
    state_NHCV: Tensor | None = None,
) -> Tensor:
    """`mmfn.ops.gated_delta_rule.gated_delta_state` by the package."""
    check_inputs(k_TKC, k_TKC, v_THV, g_TH, beta_TH, segments)
    check_state(k_TKC, v_THV, segments, state_NHCV)
    check_kernel(k_TKC, v_THV)
    rows = (x.detach() for x in (k_TKC, v_THV, g_TH, beta_TH))
    end_NHCV: Tensor = fla_rule.STATE(*rows, segments.offsets_N, segments.host_N, state_NHCV)
    return end_NHCV


def check_kernel(k_TKC: Tensor, v_THV: Tensor) -> None:
    """Raise ValueError for tensors of a device, or of a plan for one, that the kernels do not take."""
    if k_TKC.device.type == "cpu":  # where there are no kernels, but emulated ones
        return
    if k_TKC.dtype not in DTYPES:
        raise UserError(
            f"gated_delta_rule of fla is made for bfloat16 and float16 but got {k_TKC.dtype}; set "
            "layout.compute_dtype=bfloat16, or remove 'fla' from model.kernel_packages"
        )
    C, V = k_TKC.shape[2], v_THV.shape[2]
    if C > MAX_CHANNELS or C % 2 or V % 2:
        raise UserError(
            f"gated_delta_rule of fla takes heads of an even number of channels, of keys at most {MAX_CHANNELS}, but "
            f"these have {C} and {V}; remove 'fla' from model.kernel_packages"
        )


def _kernels() -> Mapping[str, Kernel]:
    operators, results = fla_rule.OPERATORS, (fla_rule.RULE.name,)
    return {
        "gated_delta_rule": Kernel(gated_delta_rule, operators=operators, results=results),
        "gated_delta_piece": Kernel(gated_delta_piece, operators=operators, results=results),
        "gated_delta_piece_grad": Kernel(gated_delta_piece_grad, operators=operators),
        "gated_delta_entry_grad": Kernel(gated_delta_entry_grad, operators=operators),
        "gated_delta_state": Kernel(gated_delta_state, operators=operators),
        "causal_conv1d": fla_conv.KERNEL,
    }


PACKAGE = Package(
    name="fla",
    distribution="fla-core",
    module=fla_rule.RULE_MODULE,
    checked=Span((0, 6), (0, 7)),
    needs={"cuda": ("triton",), "npu": ("triton-ascend",)},
    refusals=(
        Refusal(
            distribution="triton",
            versions=Span((3, 4), (3, 7, 1)),
            generation=9,
            reason="gradients of the gated delta rule are wrong on Hopper with Triton 3.4.0 to 3.7.0 (fla#640)",
            cure="install torch 2.12.1 or later, which brings Triton 3.7.1",
        ),
        Refusal(
            distribution="fla-core",
            versions=Span((0, 5, 1), (0, 5, 2)),
            reason="its gated delta rule gives NaN at some shapes on Blackwell (fla#913)",
            cure="pip install 'fla-core>=0.6,<0.7'",
        ),
    ),
    kernels=_kernels,
)
