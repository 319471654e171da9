"""From a config to this rank's shards: of the files it reads these alone, so no rank ever has the whole model.

A leaf that is drawn at random is whole for a moment, as its generator reaches a value only through those before it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mmfn import tree
from mmfn.dtypes import at_least
from mmfn.interop import adapter
from mmfn.interop.checkpoint import Weights, read_config
from mmfn.interop.hf import blank, open_hf
from mmfn.model import Model
from mmfn.models.disk_tensor import Ranges, sizes, slices, whole
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.weights.host_memory import HOST_DEVICE
from mmfn.parallel.weights.hosted import to_host
from mmfn.parallel.weights.sharding import shard_ranges, sharding_of, wrap
from mmfn.spec import ParamSpec, init_params
from mmfn.train.build.agreement import check_same, errors_in_common, sample_ranges, weights_in_common
from mmfn.train.build.model import model_specs
from mmfn.train.config.schema import Config, ModelSection


def load_shards(config: Config, place: Place, *, is_restored: bool = False) -> Model:
    """The model with this rank's shards, leaf by leaf; of one process, with whole parameters.

    `is_restored`: a checkpoint will overwrite all of them, so that no value is read or drawn; they are zeros. With
    `layout.offload` of parameters they stay in the host's memory, pinned for the device. Raises ValueError, on all
    ranks the same, for weights that do not fit (see `checkpoint.load_params`) and where ranks have different ones.
    """
    world, mesh, samples = place.host["world"], place.mesh, dict[str, Tensor]()
    is_hosted = "parameters" in config.layout.offload and place.device != HOST_DEVICE

    def load(path: str, leaf: ParamSpec) -> Tensor:
        if world.size == 1:
            (part,) = source.read(path, leaf, [whole(leaf.shape)])
        else:
            sharding = sharding_of(leaf, mesh, path)
            parts = [shard_ranges(leaf.shape, sharding), sample_ranges(leaf.shape)]
            part, samples[path] = source.read(path, leaf, parts)
        part = part if is_hosted else part.to(place.device)
        placed = part if world.size == 1 else wrap(part, torch.Size(leaf.shape), sharding)
        return to_host(placed, place.device) if is_hosted else placed

    with errors_in_common(world), _open(config.model, config.train.seed, is_restored) as (model, source):
        params = tree.map_with_path(load, model_specs(config, model.family, model.cfg))
    check_same(weights_in_common(samples), world)
    return replace(model, params=params)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where leaves come from: the first of open `files` that holds one, or a draw in `dtype` or wider.

    `is_blank`: all are zeros.
    """

    files: Sequence[Weights]
    seed: int
    dtype: torch.dtype
    is_blank: bool

    def read(self, path: str, leaf: ParamSpec, parts: Sequence[Ranges]) -> list[Tensor]:
        """Parts of one leaf on the CPU, contiguous, each with memory of its own."""
        weights = next((one for one in self.files if path in one.account.leaves), None)
        if self.is_blank:
            dtype = at_least(leaf.dtype, self.dtype) if weights is None else weights.dtype_of(path)
            return [torch.zeros(sizes(part), dtype=dtype) for part in parts]
        if weights is not None:
            return [weights.read_slice(path, part) for part in parts]
        full = init_params({path: leaf}, self.seed, self.dtype)[path]
        return [full[slices(part)].clone(memory_format=torch.contiguous_format) for part in parts]


@contextmanager
def _open(section: ModelSection, seed: int, is_blank: bool) -> Iterator[tuple[Model, _Source]]:
    """The model of a section, still without parameters, and where its leaves come from."""
    dtype, files = getattr(torch, section.dtype), list[Weights]()
    with ExitStack() as stack:
        if section.init == "load":
            model, weights = stack.enter_context(open_hf(section.path, dtype))
            files.append(weights)
        else:
            model = blank(read_config(Path(section.path)))
        if section.adapter is not None:
            files.insert(0, stack.enter_context(adapter.open_weights(section.adapter, model, dtype)))
        yield model, _Source(files=files, seed=seed, dtype=dtype, is_blank=is_blank)
