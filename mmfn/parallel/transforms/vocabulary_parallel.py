"""`vocabulary_parallel`: each rank computes the logits of its own rows of the head, for the tokens of all ranks.

Legend: T tokens of a rank, N rows of one chunk from all ranks, D width, V vocabulary (of a rank: its slice), W ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn import tree
from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.ops import logit_chunks
from mmfn.ops.cross_entropy import add_to_all_, check_head, check_settings, chunk_rows, narrow, needed
from mmfn.ops.kernel import wrapping
from mmfn.ops.logit_chunks import Gradients, aligned, gradients_in_forward
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.program import Program, Transform, noted
from mmfn.parallel.weights.sharding import rows as rows_of_rank

SITE = "vocabulary"


def vocabulary_parallel() -> Transform:
    """Compute the loss with a head that stays sharded over dp * cp ranks.

    Placement of the head: Shard(0) on shard -> the same in computation, where it is gathered without this transform.
    What travels instead are hidden states: rows of all ranks are all-gathered chunk by chunk, each rank computes its
    slice of their logits, the ranks exchange two figures and the label's logit of every row, and the gradient of the
    rows is reduce-scattered in float32 or wider. The gradient of the head is complete on its rank (replicas add theirs
    up). So no rank ever holds the head or its gradient, and of a micro-batch 2 * D values travel per supervised token
    of all ranks instead of per row of the head. A tied head is gathered for the embedding as before.

    The identity where dp * cp is 1. Raises ValueError for a vocabulary so small that a rank would have no row, and,
    from `lower`, together with compiled("step"): how many chunks there are is read from the batch.
    """

    def transform(program: Program) -> Program:
        axis = program.mesh["shard"]
        if axis.size == 1:
            return program
        num_vocabulary = _num_vocabulary(program)
        start, stop = rows_of_rank(num_vocabulary, axis.size, axis.index)
        if rows_of_rank(num_vocabulary, axis.size, axis.size - 1)[0] == num_vocabulary:
            raise UserError(
                f"layout {program.mesh.layout}: a vocabulary of {num_vocabulary} leaves one of {axis.size} ranks "
                "without a row of the head; use fewer ranks, or leave vocabulary_parallel() out"
            )
        rows = chunk_rows(num_vocabulary, program.ops.logit_bytes)
        part = Slice(axis=axis, num_vocabulary=num_vocabulary, start=start, rows=rows)
        whole = program.ops.linear_cross_entropy
        sliced = wrapping(partial(sliced_cross_entropy, part=part), whole)
        ops = replace(program.ops, linear_cross_entropy=sliced)
        note = f"vocabulary_parallel: {stop - start} of {num_vocabulary} rows of the head, tokens of {axis.size} ranks"
        return noted(replace(program, ops=ops, weights=replace(program.weights, is_head_sharded=True)), note)

    return transform


def _num_vocabulary(program: Program) -> int:
    return next(int(leaf.shape[0]) for leaf in tree.leaves(program.specs) if leaf.axes[0] == "vocab")


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Rows of a head of `num_vocabulary` rows: those of this rank of `axis`, the first of which is `start`.

    `rows`: of tokens, that a rank gives to a chunk by default.
    """

    axis: Axis
    num_vocabulary: int
    start: int
    rows: int

    def total(self, x: Tensor) -> Tensor:
        """The sum over slices."""
        return self.axis.all_reduce(x, SITE)

    def largest(self, x_N: Tensor) -> Tensor:
        """The maximum over slices."""
        return self.axis.all_gather(x_N[None], SITE).amax(0)

    def from_all(self, x_N: Tensor) -> Tensor:
        """The rows of every rank: [W, N]."""
        return self.axis.all_gather(x_N[None], SITE)


def sliced_cross_entropy(
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
    part: Slice,
) -> tuple[Tensor, Tensor]:
    """`ops.linear_cross_entropy` of this rank's tokens, with this rank's rows of head and bias.

    Labels are those of the whole vocabulary. All ranks call it together, each with its own tokens, as many as it has;
    what they multiply their losses with is the same on all. The gradient of head and bias is that of all ranks'
    losses. `chunk`: rows a rank gives at a time; the default makes logits of a chunk as large as one device's.
    Raises ValueError as `ops.linear_cross_entropy` does.
    """
    check_head(x_TD, weight_VD, bias_V, labels_T, weights_T)
    check_settings(z_loss, label_smoothing, chunk)
    compute = partial(
        _compute,
        labels_T=labels_T,
        weights_T=weights_T,
        num_labels=num_labels,
        part=part,
        rows=chunk or part.rows,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        needs=needed(x_TD, weight_VD, bias_V),
    )
    loss, ce = gradients_in_forward(compute, x_TD, weight_VD, bias_V)
    return loss, ce


def _compute(
    x_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    labels_T: Tensor,
    weights_T: Tensor,
    num_labels: Tensor | None,
    part: Slice,
    rows: int,
    z_loss: float,
    label_smoothing: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Gradients]:
    """The two losses of this rank's tokens and the gradients, those asked for."""
    V, dtype, axis = weight_VD.shape[0], wide(x_TD.dtype), part.axis
    index_N = logit_chunks.supervised(labels_T, weights_T, part.num_vocabulary, num_labels)
    own_weights_N = weights_T[index_N].to(dtype)
    each, num_chunks = _chunks(index_N, rows, part)
    tail = (0, each * num_chunks - index_N.numel())  # rows of weight 0, so that all ranks have equally many
    labels_WN = part.from_all(F.pad(labels_T[index_N], tail))
    weights_WN = part.from_all(F.pad(own_weights_N, tail))
    buffer, own = own_weights_N.new_empty(V, axis.size * each), slice(axis.index * each, (axis.index + 1) * each)
    loss, ce, smooth = own_weights_N.new_zeros(()), own_weights_N.new_zeros(()), None
    if label_smoothing:
        share = label_smoothing / part.num_vocabulary
        smooth = logit_chunks.smoothing(x_TD, weight_VD, bias_V, index_N, own_weights_N, share=share, total=part.total)
    dx_TD = torch.zeros_like(x_TD) if needs[0] else None
    dw_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs[1] else None
    db_V = weight_VD.new_zeros(V, dtype=dtype) if needs[2] else None
    for start in range(0, each * num_chunks, max(1, each)):
        index, here = index_N[start : start + each], slice(start, start + each)
        x_ND = axis.all_gather(F.pad(x_TD[index], (0, 0, 0, each - index.numel())), SITE)
        labels_N, weights_N = labels_WN[:, here].flatten(), weights_WN[:, here].flatten()
        logit_chunks.logits_(buffer, weight_VD, x_ND, bias_V)
        row = _differentiate_(buffer, labels_N - part.start, part, z_loss, label_smoothing)
        loss = loss + (row.losses_N * weights_N)[own].sum()
        ce = ce + (row.ce_N * weights_N)[own].sum()
        scale_N = weights_N * row.scale_N
        if dx_TD is not None:
            dx_ND = axis.reduce_scatter(logit_chunks.input_grad(weight_VD, buffer, scale_N), SITE)[: index.numel()]
            if smooth is not None:
                dx_ND.addr_(own_weights_N[start : start + each], smooth.x_D)
            dx_TD[index] = dx_ND.to(x_TD.dtype)
        if db_V is not None:
            db_V += buffer @ scale_N
        if dw_VD is not None:
            logit_chunks.add_head_grad_(dw_VD, buffer, x_ND, scale_N)
    if smooth is not None:
        loss = loss + smooth.loss
        add_to_all_(dw_VD, smooth.row_D)
        add_to_all_(db_V, smooth.bias)
    return loss, ce, (dx_TD, narrow(dw_VD, weight_VD), narrow(db_V, weight_VD))


def _chunks(index_N: Tensor, rows: int, part: Slice) -> tuple[int, int]:
    """Rows each rank gives to a chunk, and the number of chunks: as the rank with most supervised tokens needs."""
    most = int(part.largest(torch.tensor([index_N.numel()], device=index_N.device)))
    num_chunks = -(-most // rows)
    return aligned(-(-most // max(1, num_chunks))), num_chunks


def _differentiate_(
    logits_VN: Tensor, places_N: Tensor, part: Slice, z_loss: float, label_smoothing: float
) -> logit_chunks.Rows:
    """Overwrite this slice's logits with their gradient but for a factor per row (`logit_chunks`).

    `places_N`: labels counted from the first row of the slice; in other slices they are below 0 or beyond it.
    """
    V = logits_VN.shape[0]
    is_own_N, place_1N = (places_N >= 0) & (places_N < V), places_N.clamp(0, V - 1)[None]
    max_N = part.largest(logits_VN.amax(0))
    label_N = torch.where(is_own_N, logits_VN.gather(0, place_1N)[0] - max_N, 0.0)
    sums_N, label_N = part.total(torch.stack([logit_chunks.exponentiate_(logits_VN, max_N), label_N])).unbind(0)
    row = logit_chunks.rows_of(max_N, sums_N, label_N, z_loss, label_smoothing)
    at_label_N = label_N.exp() - row.pull_N
    logits_VN.scatter_(0, place_1N, torch.where(is_own_N, at_label_N, logits_VN.gather(0, place_1N)[0])[None])
    return row
