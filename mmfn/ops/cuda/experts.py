"""Experts by torch's grouped matrix product on GPUs: one kernel for all of them, which reads the counts on the device.

Legend: R routed rows, E experts, D width, F feed-forward width (of a product: widths in and out).
"""

from functools import partial

import torch
from torch import Tensor

from mmfn.errors import UserError
from mmfn.ops import flops
from mmfn.ops.experts import check, experts_by, multiply_at_once, product_operators, weight_grad_at_once
from mmfn.ops.kernel import Kernel, Whole
from mmfn.tree import Tree


def experts(x_RD: Tensor, counts_E: Tensor, weights: Tree) -> Tensor:
    """`mmfn.ops.experts.experts` on a GPU that has the kernel: bfloat16, widths of a multiple of 8.

    Raises ValueError as that does and for what the kernel lacks, in place of waiting for the counts.
    """
    return experts_by(partial(grouped_linear, counts_E=counts_E), x_RD, weights)


def grouped_linear(x_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """`mmfn.ops.experts.grouped_linear` in one call. Errors as of `experts`."""
    check(x_RD, weight_EFD, counts_E)
    check_kernel(x_RD, weight_EFD)
    y_RF: Tensor = _product(x_RD, weight_EFD, counts_E)
    return y_RF


def check_kernel(x_RD: Tensor, weight_EFD: Tensor) -> None:
    """Raise ValueError for tensors of a GPU, or of a plan for one, that the kernel does not take."""
    if x_RD.device.type == "cpu":  # where there is no kernel, but emulated ones
        return
    if x_RD.dtype != torch.bfloat16:
        raise UserError(
            f"experts of the cuda table are made for bfloat16 but got {x_RD.dtype}; set layout.compute_dtype=bfloat16, "
            "or model.kernels=portable"
        )
    if any(width % 8 for width in weight_EFD.shape[1:]):
        raise UserError(
            f"experts of the cuda table have widths of a multiple of 8 but these are {list(weight_EFD.shape[1:])}; use "
            "model.kernels=portable"
        )
    if x_RD.device.type == "cuda" and torch.cuda.get_device_capability(x_RD.device)[0] not in (9, 10):
        name = torch.cuda.get_device_name(x_RD.device)
        raise UserError(
            f"torch has grouped products for Hopper and Blackwell, not for {name}; use model.kernels=portable"
        )


_product, PRODUCT, WEIGHT_GRAD = product_operators(
    "mmfn::grouped_mm", multiply_at_once, weight_grad_at_once, is_whole=True
)

OPERATORS = flops.register(
    {
        PRODUCT.name: Whole(PRODUCT.direct, flops.grouped),
        WEIGHT_GRAD.name: Whole(WEIGHT_GRAD.direct, flops.grouped_grad),
    }
)
KERNEL = Kernel(experts, operators=OPERATORS, results=(PRODUCT.name,))
