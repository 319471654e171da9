"""`Model`: a family's functions, a config and parameters in one value, and the logits of a batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import linear

from mmfn import ops as op_tables
from mmfn.batch import Batch
from mmfn.tree import Tree

if TYPE_CHECKING:
    from mmfn.models import Family


@dataclass(frozen=True, kw_only=True)
class Model:
    """`params` is a pytree of tensors, `cfg` the family's config, `hf_config` the dict of config.json it came from.

    `verbatim`: names of what its checkpoint holds beside the parameters and a checkpoint saved from it carries on.
    """

    family: "Family"
    cfg: Any
    params: Tree = field(repr=False)
    hf_config: Mapping[str, Any] = field(repr=False)
    verbatim: tuple[str, ...] = field(default=(), repr=False)


def logits(model: Model, batch: Batch, ops: op_tables.Ops | None = None) -> Tensor:
    """`logits_TV` of the real tokens of a packed batch, row after row; padding behind the last row is removed.

    In the parameters' dtype, [tokens, vocabulary]. `ops` defaults to `ops.portable()`. Differentiable in
    `model.params`. Training never needs this: the loss fuses the head.
    """
    table = ops or op_tables.portable()
    hidden_TD = model.family.apply(model.params, batch, model.cfg, table).hidden_TD
    num_tokens = int(batch.segments.offsets_N[-1])
    return linear(hidden_TD[:num_tokens], model.family.head(model.params, model.cfg, table))
