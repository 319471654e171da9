"""From a training checkpoint, whatever mesh wrote it, to a folder for elsewhere: in one process, leaf by leaf."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mmfn import tree
from mmfn.dtypes import at_least
from mmfn.errors import UserError
from mmfn.interop import export
from mmfn.interop.checkpoint import read_config
from mmfn.interop.export import Contents, Piece
from mmfn.interop.hf import blank, open_hf
from mmfn.lora import merge_weight
from mmfn.model import Model
from mmfn.spec import ParamSpec
from mmfn.train.build.model import model_specs
from mmfn.train.build.processor import eos_token_ids, load_model_processor
from mmfn.train.checkpoint import Checkpoint
from mmfn.train.config.load import load_text
from mmfn.train.config.schema import Config, ModelSection
from mmfn.train.run.save import contents_of, merged_adapters
from mmfn.train.run.stored import Stored, names_of
from mmfn.tree import Tree


def settings_of(checkpoint: Checkpoint, *, model: str | None = None, **output: str | None) -> Config:
    """The settings of the run that wrote a checkpoint, with another `model.path`, and others of `output` where given.

    These decide nothing but what is written, so no rule between settings is asked about them.
    """
    config = load_text(checkpoint.manifest.facts.config, str(checkpoint.folder)).config
    changed = {name: value for name, value in output.items() if value is not None}
    path = config.model.path if model is None else model
    sections = {
        "output": config.output.model_copy(update=changed),
        "model": config.model.model_copy(update={"path": path}),
    }
    return config.model_copy(update=sections)


def export_state(checkpoint: Checkpoint, config: Config, out: Path, kind: str, dtype: torch.dtype | None) -> None:
    """Write what was trained up to a checkpoint as a folder of a kind: "checkpoint" (adapters merged) or "adapter".

    `config`: what counts are model, lora, freeze, data (chats, media) and output. `dtype`: of the parameters that
    declare no wider one, default that of training. Never more than one leaf, or as many small ones, are in memory.
    Raises ValueError for a checkpoint of another model, a folder that is not empty, and what cannot be exported.
    """
    export.check_empty(out)
    if kind == "adapter" and not config.has_adapters:
        raise UserError("the run trained no adapters; leave --adapter out")
    processor = load_model_processor(config.model.path, config.data.chat, config.data.media_settings)
    model = _model(config.model)
    specs = model_specs(config, model.family, model.cfg)
    stored = Stored(checkpoint=checkpoint, names=names_of(checkpoint, specs, config.output.weights))

    def hold(path: str, leaf: ParamSpec) -> Tensor:
        kind = stored.dtype_of(path) if dtype is None else at_least(leaf.dtype, dtype)
        return torch.empty(leaf.shape, dtype=kind, device="meta")

    model = replace(model, params=tree.map_with_path(hold, specs))
    eos = eos_token_ids(Path(config.model.path), processor, model.cfg.vocab_size)
    what = contents_of(kind, config, model, specs, processor, eos)
    export.save(out, what, _pieces(model.params, what, stored))


def _model(section: ModelSection) -> Model:
    """The model of a section without parameters; of its weights names alone are read."""
    if section.init == "random":
        return blank(read_config(Path(section.path)))
    with open_hf(section.path) as (model, _):
        return model


def _pieces(params: Tree, what: Contents, stored: Stored) -> Iterator[Piece]:
    """All leaves of a folder, some small ones at a time; adapters that have no place in it are merged."""
    leaves, adapters = dict(tree.items(params)), merged_adapters(params, what)
    needed = {path: [path] for path in leaves if path in what.leaves}
    for path, adapter in adapters.items():
        head, _, name = path.rpartition("/")
        needed[path] += [f"{head}/lora/{name}/{side}" for side in ("a", "b")]
        assert all(leaves[p] is side for p, side in zip(needed[path][1:], (adapter.a, adapter.b), strict=True))
    sizes = {path: sum(map(stored.num_bytes, paths)) for path, paths in needed.items()}
    for group in _groups(sizes):
        values = stored.read([p for path in group for p in needed[path]])
        for path in group:
            value, *factors = (values.pop(p) for p in needed[path])
            if factors:
                value = merge_weight(value, replace(adapters[path], a=factors[0], b=factors[1]))
            yield Piece.whole(path, value)
        del value, factors  # before the next ones are read


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Paths in their order, in groups that are together no larger than the largest of them."""
    most, group, filled = max(sizes.values(), default=0), list[str](), 0
    for path, size in sizes.items():
        if group and filled + size > most:
            yield group
            group, filled = [], 0
        group.append(path)
        filled += size
    if group:
        yield group
