"""Cross entropy of a linear head. Legend: T tokens, D width, V vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.batch import IGNORE


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor) -> Tensor:
    """`sum_t weights_T[t] * cross_entropy(x_TD[t] @ weight_VD.T, labels_T[t])` over labels other than `IGNORE`."""
    return linear_cross_entropy_reference(x_TD, weight_VD, labels_T, weights_T)


def linear_cross_entropy_reference(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor) -> Tensor:
    """`linear_cross_entropy` with all logits at once."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    logits_TV = F.linear(x_TD, weight_VD).to(wide)
    losses_T = logits_TV.logsumexp(-1) - logits_TV.gather(-1, labels_T.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels_T == IGNORE, 0.0, losses_T * weights_T).sum()
