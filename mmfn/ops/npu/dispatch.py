"""What lies around experts, by `npu_moe_token_permute` and `npu_moe_token_unpermute`.

The first returns, for the i-th expert of token t, the row at place `t * X + i`: `place_TX`, as the second wants it.

Legend: T tokens, X experts per token, R = T * X routed rows, D width, E experts.
"""

import torch
from torch import Tensor

from mmfn.ops import dispatch as portable
from mmfn.ops.kernel import Operators
from mmfn.ops.npu.limits import LIMITS, Limits


def dispatch(
    x_TD: Tensor, experts_TX: Tensor, num_experts: int, *, limits: Limits = LIMITS
) -> tuple[Tensor, Tensor, Tensor]:
    """`mmfn.ops.dispatch.dispatch`: rows in a stable order of experts, those of no expert (number E) last.

    Raises ValueError as the portable one does, and beyond the limits of the operator.
    """
    portable.check_experts(x_TD, experts_TX)
    limits.check("dispatch", x_TD, ("experts", num_experts, limits.experts))
    x_RD, place_R = torch.ops.npu.npu_moe_token_permute(x_TD, experts_TX)
    counts_E = torch.histc(experts_TX.float(), num_experts + 1, 0, num_experts + 1)[:-1].long()
    return x_RD, counts_E, place_R.view(experts_TX.shape).long()


def combine(y_RD: Tensor, place_TX: Tensor, weights_TX: Tensor, *, limits: Limits = LIMITS) -> Tensor:
    """`mmfn.ops.dispatch.combine`. Raises ValueError as the portable one does, and for a dtype that is not taken."""
    portable.check_rows(y_RD, place_TX, weights_TX)
    limits.check("combine", y_RD)
    y_TD: Tensor = torch.ops.npu.npu_moe_token_unpermute(y_RD, place_TX.flatten().int(), weights_TX)
    return y_TD


DISPATCHED = ("npu::npu_moe_token_permute",)
COMBINED = ("npu::_npu_moe_token_unpermute",)  # what the other is made of, and what a dispatch mode sees
DISPATCH: Operators = dict.fromkeys((*DISPATCHED, "npu::npu_moe_token_permute_grad_v2"))
COMBINE: Operators = dict.fromkeys((*COMBINED, "npu::npu_moe_token_unpermute_grad_v2"))
