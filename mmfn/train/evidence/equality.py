"""Steps of training on a mesh against the same on one device: same weights, same data, every number compared.

Whole states are compared, so one rank must be able to hold them: this is what one device is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfn import tree
from mmfn.batch import to
from mmfn.errors import UserError
from mmfn.parallel.mesh import launch
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.weights.sharding import whole
from mmfn.train.build.data import build_loader
from mmfn.train.build.model import find_device, find_family
from mmfn.train.build.program import build_program
from mmfn.train.build.run import alone
from mmfn.train.build.shards import load_shards
from mmfn.train.build.step import build_objective, build_step
from mmfn.train.config.load import Loaded
from mmfn.train.data import Dataset, Workers
from mmfn.train.evidence.library import widen
from mmfn.train.objective import weigh_by

METRICS = ("loss", "grad_norm")
LEAST = (
    1e-6  # of the largest value of its kind: what lies below is compared with that; gradients may be 0 but for rounding
)
Outcome = dict[str, Tensor]  # "params/...", "optimizer/...", and "loss/1", ... of every step


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How many steps are taken of a run, and in which dtype."""

    number: int
    dtype: torch.dtype

    def take(self, loaded: Loaded, dataset: Dataset, place: Place) -> Outcome:
        """The steps as one rank sees them: metrics, then parameters and optimizer, whole and on the host."""
        config = loaded.config
        family, cfg = find_family(config.model)
        program = build_program(config, family, cfg, place.mesh)
        model = load_shards(config, place)
        if self.dtype == torch.float64:
            model = replace(model, params=tree.map(lambda leaf: leaf.double(), model.params))
        step, state = build_step(config, model, program, place.device)
        loader = build_loader(config, dataset, model, program, place.host["batch"])
        objective, own = build_objective(config.objective), place.host["batch"].index
        found: Outcome = {}
        for number, share in enumerate(loader.steps(self.number, workers=Workers(number=0)), start=1):
            loader.check_share(share)
            weighed = weigh_by(share.microbatches, objective, share.labels_DAN, own)
            batches = [widen(to(batch, place.device), self.dtype) for batch in weighed]
            state, metrics = step(state, batches)
            found |= {f"{name}/{number}": metrics[name].detach().cpu() for name in METRICS}
        for kind, leaves in (("params", state["params"]), ("optimizer", state["opt"])):
            found |= {f"{kind}/{path}": whole(leaf, place.mesh).detach().cpu() for path, leaf in tree.items(leaves)}
        return found


def compare(spread: Loaded, plain: Loaded, dataset: Dataset, steps: Steps) -> dict[str, float]:
    """Figures of a layout whose ranks are threads of this process."""
    device = find_device(plain.config.model.device)
    want = steps.take(plain, dataset, alone(device))
    ranks = virtual(
        spread.config.layout.sizes,
        lambda mesh: steps.take(spread, dataset, Place(device=device, mesh=mesh, host=mesh)),
    )
    return _worst([difference(found, want) for found in ranks])


def compare_on_ranks(
    spread: Loaded, plain: Loaded, dataset: Dataset, steps: Steps, ranks: launch.Ranks
) -> dict[str, float]:
    """Figures of a layout whose ranks are processes, of which this is one; those of the first rank."""
    section = spread.config.layout
    device = find_device(spread.config.model.device, ranks)
    apart = ranks.apart(section.model_dump_json())  # once for each layout
    with launch.placed(apart, section.sizes, device, section.timeout_s) as place:
        found = steps.take(spread, dataset, place)
        return difference(found, steps.take(plain, dataset, alone(device))) if place.is_first else {}


def difference(found: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """By the first part of their names, the largest difference of values, relative to the largest of their tensor."""
    if found.keys() != want.keys():
        odd = min(found.keys() ^ want.keys())
        raise UserError(f"{odd} is there on a mesh or on one device alone; compare layouts whose optimizers are alike")
    figures: dict[str, float] = {}
    tops = {name: _largest(value) for name, value in want.items()}
    for name, value in want.items():
        kind = name.partition("/")[0]
        top = max(other for key, other in tops.items() if key.partition("/")[0] == kind)
        error = _largest(found[name].double() - value.double())
        figures[kind] = max(figures.get(kind, 0.0), error / max(tops[name], LEAST * top, 1e-300))
    return figures


def _largest(value: Tensor) -> float:
    return value.double().abs().max().item() if value.numel() else 0.0


def _worst(figures: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(one[name] for one in figures) for name in figures[0]}
