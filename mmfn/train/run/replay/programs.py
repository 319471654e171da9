"""The programs of a replay: that of the run, to be watched, and changed ones."""

from collections.abc import Mapping
from typing import Any

import torch

from mmfn.ops import Ops
from mmfn.parallel.program import Program, lower
from mmfn.train.build.kernels import build_ops
from mmfn.train.build.program import build_program
from mmfn.train.build.run import Run
from mmfn.train.config.schema import Config
from mmfn.train.run.replay.watch import Watch

PLAIN: Mapping[str, Any] = {
    "remat": "full", "remat_stacks": {}, "remat_save": ("attention",), "remat_every": 1, "remat_layers": 1,
    "offload": (), "keep_gathered": False, "reshard_after_forward": False,
}  # fmt: skip
"""What changes no number of an eager step: blocks are computed again, and nothing is moved."""


def plain(config: Config) -> Config:
    """The config of the program that is watched: eager, with the layout settings of `PLAIN`."""
    return _having(config, train={"compile": "none"}, layout=PLAIN)


def on_device(config: Config) -> Config:
    """The config of a program whose parameters lie where it computes."""
    return _having(config, layout={"offload": tuple(what for what in config.layout.offload if what != "parameters")})


def in_dtype(config: Config, dtype: torch.dtype) -> Config:
    """The config of a program that computes in a dtype from one end to the other, in which its parameters come.

    Rows are exchanged by themselves: operators that multiply them too take narrow ones only.
    """
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"  # wider ones are computed in what they are
    none = {"compute_dtype": None, "compute_rules": None, "reduce_dtype": None, "fused_exchange": False}
    return _having(config, model={"dtype": name}, layout=none)


def lower_program(run: Run, config: Config, watch: Watch | None) -> Program:
    """The program of a config on a run's mesh, watched or not."""
    ops: Ops = build_ops(config.model)
    ops = ops if watch is None else watch.table(ops)
    program = lower(build_program(config, run.model.family, run.model.cfg, run.place.mesh, ops=ops))
    return program if watch is None else watch.program(program)


def _having(config: Config, **sections: Mapping[str, Any]) -> Config:
    """A config with other values in some sections, of which it is known that they fit."""
    changed = {name: getattr(config, name).model_copy(update=dict(values)) for name, values in sections.items()}
    return config.model_copy(update=changed)
