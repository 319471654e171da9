"""The global gradient norm and clipping by it."""

from dataclasses import replace

import torch
from torch import Tensor

from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.torch_private import foreach_norm
from mmfn.train.optim.transform import Leaves, Transform, Update
from mmfn.tree import Tree

PIECE = 65_536  # values per partial sum of the gradient norm


def clip_by_global_norm(max_norm: float) -> Transform:
    """Scale all gradients by `min(1, max_norm / (norm + 1e-6))`, without touching them: the factor goes to `scale`.

    Raises ValueError when `max_norm` is not positive. Source: `torch.nn.utils.clip_grad_norm_` (torch 2.13).
    """
    if not max_norm > 0:
        raise UserError(f"max_norm must be positive, got {max_norm}; leave clip_by_global_norm out for no clipping")

    def run(u: Update, state: Tree) -> tuple[Update, Tree]:
        factor = (max_norm / (u.norm + 1e-6)).clamp(max=1.0)
        return replace(u, scale=factor if u.scale is None else u.scale * factor), state

    return Transform(init=lambda params: {}, update=lambda facts: run, stage="scale")


def global_norm(grads: Leaves) -> Tensor:
    """0-D norm of all leaves together, float32 or wider, in one pass over the gradients.

    Large leaves are summed in pieces: torch adds up a whole float32 tensor in a handful of lanes on the CPU, which is
    off by 2e-4 at 8 million values and grows with the size.
    """
    dtype = wide(*(g.dtype for g in grads.values()))
    norms: list[Tensor] = []
    rest: list[Tensor] = []
    for grad in grads.values():
        whole = grad.numel() // PIECE * PIECE
        if whole:
            flat = grad.reshape(-1)
            norms.append(torch.linalg.vector_norm(flat[:whole].view(-1, PIECE), dim=1, dtype=dtype))
            grad = flat[whole:]
        if grad.numel():
            rest.append(grad)
    if rest:
        norms.append(torch.stack(foreach_norm(rest, dtype)))
    norm: Tensor = torch.linalg.vector_norm(torch.cat(norms)) if norms else torch.zeros((), dtype=dtype)
    return norm
