"""From a config to a model's forward pass, on its layout: what evaluation and generation compute with."""

from mmfn import tree
from mmfn.model import Model
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import by_rows
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.weights.sharding import local
from mmfn.train.build.kernels import build_ops
from mmfn.train.build.model import model_specs
from mmfn.train.build.program import build_precision
from mmfn.train.config.schema import Config
from mmfn.train.forward import Forward
from mmfn.tree import Tree


def build_forward(config: Config, model: Model, place: Place, specs: Tree | None = None) -> Forward:
    """A model's forward pass on the ranks of a config's layout, for evaluation and generation.

    `model.params` are this rank's shards. Dtypes, kernels are those of training, and parameters may lie on the host.
    What serves a backward has no part in it, each rank takes rows of its own (`by_rows`), and experts drop none.
    """
    specs, mesh = specs or model_specs(config, model.family, model.cfg), by_rows(place.mesh)
    is_hosted = local(tree.leaves(model.params)[0]).device != place.device
    program = pipe(
        Program.of(specs, build_ops(config.model), mesh),
        expert_parallel(),
        *([offload("parameters")] if is_hosted else []),
        data_parallel(prefetch=config.layout.prefetch),
        *build_precision(config),
    )
    return Forward.on_shards(model, program, place.device, place.host["world"])
