"""`Forward`: a model as one rank runs it without gradients, whole or on shards. Evaluation and generation take one.

On several ranks a block's weights are gathered, used and released as in training, so no rank ever holds the model
whole. Every rank has rows of its own, those of cp too, and all take part in the same calls: whoever has nothing to
compute computes an idle row (`Forward.pack`). Legend: T tokens, D width, V vocabulary.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmfn import tree
from mmfn.batch import IGNORE, TEXT, Batch, Sample, to
from mmfn.model import Model
from mmfn.models import Family, Output
from mmfn.ops import Ops, portable
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.program import Program, lower
from mmfn.parallel.weights.hosted import handles
from mmfn.parallel.weights.sharding import check_shards, shardings
from mmfn.tree import Tree

ALONE = Axis(name="world")
IDLE = Sample(tokens_T=torch.zeros(1, dtype=torch.int64), labels_T=torch.tensor([IGNORE]), kinds_T=torch.tensor([TEXT]))
"""What a rank computes that has no row, as it must take part in what the others compute."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Forward:
    """A model's forward pass. `params`: as a model that uses `ops` is given them. `dtype`: of what flows through the
    text. `axis`: the ranks that compute together, on the CPU, each with its own rows."""

    family: Family
    cfg: Any
    params: Tree
    ops: Ops
    dtype: torch.dtype
    device: torch.device
    axis: Axis = ALONE

    @staticmethod
    def of(model: Model, ops: Ops | None = None) -> "Forward":
        """A whole model on one device, in the dtype of its parameters. `ops` defaults to `ops.portable()`."""
        table, leaf = ops or portable(), tree.leaves(model.params)[0]
        head_VD = model.family.head(model.params, model.cfg, table)
        return Forward(
            family=model.family,
            cfg=model.cfg,
            params=model.params,
            ops=table,
            dtype=head_VD.dtype,
            device=leaf.device,
        )

    @staticmethod
    def on_shards(model: Model, program: Program, device: torch.device, axis: Axis) -> "Forward":
        """A model whose parameters are this rank's shards, as a program that is not lowered runs it on `device`.

        The program splits no batch over ranks. `axis`: all ranks, on the CPU. Raises ValueError for parameters that do
        not lie where the program takes them to lie, and as `lower` does.
        """
        check_shards(model.params, shardings(program.specs, program.mesh))
        lowered = lower(program)
        stands = handles(model.params, device) if program.weights.is_hosted else model.params
        return Forward(
            family=model.family,
            cfg=model.cfg,
            params=lowered.enter(stands, model.params),
            ops=lowered.ops,
            dtype=_embedding_dtype(lowered, model.params),
            device=device,
            axis=axis,
        )

    def __call__(self, batch: Batch, cache: Any = None) -> Output:
        """The output of a batch on the device; what predicts tokens further ahead is not computed."""
        return self.family.apply(self.params, replace(batch, ahead=()), self.cfg, self.ops, cache=cache)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """`logits_TV` of hidden states, in the dtype of the head."""
        head_VD = self.family.head(self.params, self.cfg, self.ops)
        return linear(hidden_TD.to(head_VD.dtype), head_VD)

    def pack(self, samples: Sequence[Sample]) -> Batch:
        """Samples end to end, without padding, on the device; one idle row where there are none."""
        return to(self.family.pack_bytes(samples or [IDLE], self.cfg), self.device)

    @torch.no_grad()
    def loss_sums(self, samples: Sequence[Sample], keys: Sequence[Key]) -> dict[Key, tuple[float, int]]:
        """Key -> (cross entropy summed over the supervised tokens of its samples, their number): parts add up.

        `keys[i]` is that of sample i, so one call tells apart data sets or kinds of media. Of next tokens alone:
        further losses do not count. Whoever has no sample calls it as well.
        """
        batch = self.pack(samples)
        hidden_TD = self(batch).hidden_TD
        head_VD = self.family.head(self.params, self.cfg, self.ops)
        hidden_TD, found = hidden_TD.to(head_VD.dtype), dict[Key, tuple[float, int]]()
        for key in dict.fromkeys(keys):
            of_key_N = torch.tensor([other == key for other in keys], device=self.device)
            is_label_T = of_key_N[batch.segment_T] & (batch.labels_T != IGNORE)
            labels_T = batch.labels_T.where(is_label_T, IGNORE)
            _, ce = self.ops.linear_cross_entropy(hidden_TD, head_VD, labels_T, is_label_T.to(batch.weights_T.dtype))
            found[key] = ce.item(), int(is_label_T.sum())
        return found


def _embedding_dtype(program: Program, params: Tree) -> torch.dtype:
    """The dtype in which the embedding is computed, and so all that flows through the text."""
    pairs = zip(tree.items(program.specs), tree.leaves(params), strict=True)
    spec, leaf = next((spec, leaf) for (path, spec), leaf in pairs if spec.axes[0] == "vocab" and path[:5] != "head/")
    return spec.compute or program.weights.compute or leaf.dtype
