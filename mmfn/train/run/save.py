"""What a run leaves to be used elsewhere: a checkpoint, adapters, and how their data are to be prepared.

All ranks write, each the elements of its shards: no rank ever has the whole model.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mmfn import tree
from mmfn.interop import adapter, export
from mmfn.interop.export import Contents, Piece, Writers
from mmfn.interop.hf import checkpoint_contents
from mmfn.lora import Adapter, adapters_of, merge_weight, without_adapters
from mmfn.model import Model
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.host_values import on_all
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.weights.hosted import to_device
from mmfn.parallel.weights.recut import cut_for_disk
from mmfn.parallel.weights.sharding import local, whole
from mmfn.parallel.weights.slices import Turns, cut_of
from mmfn.train.build.processor import with_end_tokens
from mmfn.train.build.run import Run
from mmfn.train.config.schema import Config
from mmfn.train.data.processor import Processor, settings_texts
from mmfn.tree import Tree


def save_trained(run: Run, params: Tree, folder: Path) -> dict[str, Path]:
    """Write what was trained into `folder`: a checkpoint with adapters merged into it, the adapters, or both, by kind.

    `params`: this rank's shards. All ranks call it. What an earlier run has left there of a kind is
    replaced when the new one is whole. Raises ValueError on all ranks, one sentence, where one cannot write.
    """
    config, place, saved = run.loaded.config, run.place, {}
    model = replace(run.model, params=params)
    for kind in kinds_of(config):
        target = folder / kind
        what = contents_of(kind, config, model, run.specs, run.processor, run.eos_token_ids)
        export.save(target, what, shard_pieces(params, what, place), writers_of(place.host["world"], target))
        saved[kind] = target
    return saved


def writers_of(world: Axis, target: Path) -> Writers:
    """All ranks as the writers of a folder. `world`: on the CPU."""
    agree = partial(on_all, axis=world, what=f"writing {target}")
    return Writers(index=world.index, size=world.size, on_all=agree)


def kinds_of(config: Config) -> tuple[str, ...]:
    """What a run saves: "adapter", "checkpoint" or both."""
    if not config.has_adapters:
        return ("checkpoint",)
    return {"merged": ("checkpoint",), "separate": ("adapter",), "both": ("adapter", "checkpoint")}[
        config.output.adapter
    ]


def contents_of(
    kind: str, config: Config, model: Model, specs: Tree, processor: Processor, eos_token_ids: Sequence[int]
) -> Contents:
    """What a folder of a kind is going to hold; of the model's parameters dtypes alone count.

    Each gets the chat template it was trained with, unless that came with the model; a checkpoint the bounds of media,
    and, where its base does not say what ends an answer, a generation_config.json that does.
    """
    chat, source = processor.chat, Path(config.model.path)
    texts = {} if chat.template == chat.tokenizer.chat_template else {"chat_template.jinja": chat.template}
    if kind == "adapter":
        return adapter.contents(model, specs, config.model.path, texts)
    if (settings := with_end_tokens(source, eos_token_ids)) is not None:
        texts["generation_config.json"] = json.dumps(settings, indent=2) + "\n"
    if config.data.media_settings:
        texts |= settings_texts(source, processor.media)
    plain = replace(model, params=without_adapters(model.params))
    return checkpoint_contents(plain, source, layout=config.output.experts, texts=texts)


def shard_pieces(params: Tree, what: Contents, place: Place) -> Iterator[Piece]:
    """What this rank writes of a folder, leaf by leaf; adapters that have no place in it are merged into their weights.

    Ranks exchange values on the way (factors of adapters, rows of what is stored in another order), so all of them take
    all pieces. Of equal copies one is written, each rank as many bytes of them as the others.
    """
    turns, adapters, world = Turns(), merged_adapters(params, what), place.host["world"]
    for path, leaf in tree.items(params):
        if path not in what.leaves:
            continue
        cut = cut_of(leaf, world)
        if turns.next(cut.num_copies, leaf.numel() * leaf.element_size()) != cut.copy_of(world.index):
            continue
        values = local(to_device(leaf, place.device)).detach()  # where it may not lie (`layout.offload`)
        if path in adapters:
            own = to_device(adapters[path], place.device)
            a = whole(own.a, place.mesh, dim=own.a.ndim - 2)
            values = merge_weight(values, replace(own, a=a.detach(), b=local(own.b).detach()))
        _, tensor = what.leaves[path][0]
        ranges, values = cut_for_disk(values, leaf, place.mesh, tensor.dims)
        yield Piece(path=path, ranges=ranges, values=values)


def merged_adapters(params: Tree, what: Contents) -> Mapping[str, Adapter]:
    """Adapters of weights, by path, that have no place in a folder, so that they are merged."""
    names = {path.replace("/lora/", "/").rpartition("/")[0] for path in what.leaves if "/lora/" in path}
    return {path: one for path, one in adapters_of(params).items() if path not in names}
