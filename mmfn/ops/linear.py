"""Linear layers: `x @ weight.T + bias`. Legend: D width in, F width out, behind and before any leading dims."""

import torch.nn.functional as F
from torch import Tensor

from mmfn.ops.kernel import Kernel


def linear(x_D: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`y_F = weight_FD @ x_D + bias_F` for every row of x.

    `x_D`: floating[..., D]. `weight_FD`: [F, D], `bias_F`: [F], of x's dtype. Returns [..., F] of the same dtype.
    Raises ValueError for other shapes and dtypes. Oracle: `linear_reference`.
    """
    _check(x_D, weight_FD, bias_F)
    return F.linear(x_D, weight_FD, bias_F)


def linear_reference(x_D: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`linear` as a sum over products."""
    _check(x_D, weight_FD, bias_F)
    y_F = (x_D[..., None, :] * weight_FD).sum(-1)
    return y_F if bias_F is None else y_F + bias_F


def _check(x_D: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> None:
    if weight_FD.ndim != 2 or x_D.shape[-1:] != weight_FD.shape[1:]:
        raise ValueError(
            f"x_D {tuple(x_D.shape)} and weight_FD {tuple(weight_FD.shape)} must be [..., D] and [F, D] with one D"
        )
    if bias_F is not None and bias_F.shape != weight_FD.shape[:1]:
        raise ValueError(
            f"bias_F has shape {tuple(bias_F.shape)} but the weight {weight_FD.shape[0]} rows; give one value for each"
        )
    if not x_D.dtype == weight_FD.dtype or not x_D.is_floating_point():
        raise ValueError(f"x_D is {x_D.dtype} and weight_FD {weight_FD.dtype}; cast both to one floating dtype")


KERNEL = Kernel(linear, results=("aten::mm", "aten::addmm"))
