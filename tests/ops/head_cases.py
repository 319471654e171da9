"""What tests of linear heads share: the loss in all its forms, that of torch, inputs, and a watch on operators."""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmfn.batch import IGNORE
from mmfn.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

SIZES = [(37, 50, 12), (1, 7, 3), (9, 1, 4), (16, 33, 1), (0, 5, 3)]  # T, V, D


def loss_of(*args, **settings):
    return linear_cross_entropy(*args, **settings)[0]


def reference(*args, **settings):
    return linear_cross_entropy_reference(*args, **settings)[0]


def traced(x, head, labels, weights, *, bias_V=None, z_loss=0.0, label_smoothing=0.0, chunk=2, method="logits"):
    """The operator that graphs hold; the eager entry refuses the second backward that gradcheck makes."""
    needs = [leaf is not None and leaf.requires_grad for leaf in (x, head, bias_V)]
    inputs = (x, head, bias_V, labels, weights, None, chunk, z_loss, label_smoothing, method, needs)
    return torch.ops.mmfn.linear_cross_entropy(*inputs)[0]


FUNCTIONS = {
    "whole": loss_of,
    "chunked": partial(loss_of, chunk=4),
    "rows": partial(loss_of, chunk=1),
    "traced": partial(traced, chunk=4),
    "reference": reference,
}
ATTENDING = {  # the head meets all tokens, some, and one; then masks are of a few pairs, too
    "attention": partial(loss_of, method="attention"),
    "chunked": partial(loss_of, method="attention", chunk=4),
    "rows": partial(loss_of, method="attention", chunk=1),
    "traced": partial(traced, method="attention"),
}
ALL = {**FUNCTIONS, **{f"attention {name}": fn for name, fn in ATTENDING.items()}}


def draw(T, V, D, dtype=torch.float64, supervised="some", scale=1.0):
    """x and head as leaves, labels, weights."""
    generator = torch.Generator().manual_seed(T + V + D)
    x = (scale * torch.randn(T, D, dtype=torch.float64, generator=generator)).to(dtype).requires_grad_()
    head = torch.randn(V, D, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(V, (T,), generator=generator)
    labels[{"all": [], "some": slice(0, None, 3), "none": slice(None)}[supervised]] = IGNORE
    weights = torch.rand(T, generator=generator, dtype=dtype if dtype == torch.float64 else torch.float32)
    return (x, head), labels, weights


def full_logits(x, head, labels, weights, *, bias_V=None, z_loss=0.0, label_smoothing=0.0):
    logits = F.linear(x, head, bias_V)
    settings = {"ignore_index": IGNORE, "label_smoothing": label_smoothing, "reduction": "none"}
    losses = F.cross_entropy(logits, labels, **settings)
    squares = torch.where(labels == IGNORE, 0.0, logits.logsumexp(-1).square())
    return ((losses + z_loss * squares) * weights).sum()


def gradients(loss, leaves, factor=1.0):
    return torch.autograd.grad(factor * loss, leaves)


class Shapes(TorchDispatchMode):
    """The largest number of values of any tensor an operator returns, and the matrix products run."""

    is_eager = True

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            in_memory = out.untyped_storage().nbytes() // out.itemsize  # of an expanded tensor, less than it shows
            self.largest = max(self.largest, min(out.numel(), in_memory))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return out
