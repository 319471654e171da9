"""Optimizers as `Transform(init, update)` pairs: `chain(clip_by_global_norm(1.0), adamw(weight_decay=0.1))`.

`transform` says what a transform is and combines them, `by_path` holds the rules for single leaves, and each optimizer
has a file of its own: `adamw`, `muon`, `sgd`.
"""

from mmfn.train.optim.adamw import adamw
from mmfn.train.optim.by_path import by_path
from mmfn.train.optim.ema import ema, ema_params
from mmfn.train.optim.muon import muon, with_others
from mmfn.train.optim.norm import clip_by_global_norm, global_norm
from mmfn.train.optim.on_host import HOST_KINDS, on_host
from mmfn.train.optim.sgd import sgd
from mmfn.train.optim.transform import (
    KERNELS,
    Facts,
    Leaves,
    Rate,
    Transform,
    Update,
    UpdateFn,
    chain,
    distances,
    facts_of,
    masked,
    master,
    own,
)

__all__ = [
    "HOST_KINDS",
    "KERNELS",
    "Facts",
    "Leaves",
    "Rate",
    "Transform",
    "Update",
    "UpdateFn",
    "adamw",
    "by_path",
    "chain",
    "clip_by_global_norm",
    "distances",
    "ema",
    "ema_params",
    "facts_of",
    "global_norm",
    "masked",
    "master",
    "muon",
    "on_host",
    "own",
    "sgd",
    "with_others",
]
