"""From a config to everything a run needs: model, data, step. All that a user can get wrong is found here.

Nothing is written. A run folder is made only after `prepare` has returned.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmfn import tree
from mmfn.batch import IGNORE
from mmfn.interop import export
from mmfn.interop.checkpoint import read_config
from mmfn.interop.hf import init, load_hf
from mmfn.model import Model
from mmfn.models import Family
from mmfn.parallel.compiled import compiled
from mmfn.parallel.context_parallel import context_parallel
from mmfn.parallel.data_parallel import data_parallel
from mmfn.parallel.expert_parallel import expert_parallel
from mmfn.parallel.host import wait_for_all
from mmfn.parallel.launch import Place, Ranks
from mmfn.parallel.mesh import Layout, Mesh, single_mesh
from mmfn.parallel.precision import precision
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.remat import remat
from mmfn.parallel.sharding import shard, sharding_of
from mmfn.parallel.split import segment_multiple, token_multiple
from mmfn.train import optim
from mmfn.train.config import Config, LayoutSection, Loaded, ModelSection, OptimizerSection
from mmfn.train.data import Dataset, Loader, Processor, load_processor
from mmfn.train.data.template import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from mmfn.train.data.tokenizer import read_json
from mmfn.train.objective import resolve
from mmfn.train.run_folder import check_output
from mmfn.train.schedule import Schedule, schedule
from mmfn.train.step import State, Step, init_state, make_step

MEDIA_TOKENS = {
    "image_token_id": IMAGE_PAD,
    "video_token_id": VIDEO_PAD,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A checked run. `state` before the first step holds the model's own parameters, which training overwrites.

    On a mesh the model's parameters are this rank's shards.
    """

    loaded: Loaded
    place: Place
    model: Model
    processor: Processor
    loader: Loader
    held_out: Dataset | None
    step: Step
    state: State
    eos_token_ids: tuple[int, ...]


def prepare(loaded: Loaded, say: Callable[[str], None], place: Place | None = None) -> Run:
    """Load and check everything a training run needs; `say` is given a line about what takes time.

    `place`: by default this process alone. Its ranks check the data together, and return when all of them are done.
    Raises ValueError, one sentence, for whatever is missing, broken or does not fit together.
    """
    config = loaded.config
    if place is None or place.is_first:  # the one that writes
        check_output(loaded)
    resolve(config.objective.name)
    processor = load_model_processor(config.model.path, config.data.template)
    train_set = open_dataset(config, config.data.train, processor)
    held_out = open_dataset(config, config.data.eval, processor) if config.data.eval is not None else None
    place = place or alone(find_device(config.model.device))
    check_attention(config, place.device)
    model = load_shards(config, place)
    check_match(model, processor)
    export.check_layout(model.family.specs(model.cfg), model.family.key_map(model.cfg), config.output.experts)
    eos = eos_token_ids(Path(config.model.path), processor, model.cfg.vocab_size)
    program = build_program(config, model.family, model.cfg, place.mesh)
    for note in program.notes:
        say(note)
    step, state = build_step(config, model, program)
    loader = build_loader(config, train_set, model, program)
    check_data(config, loader, train_set, held_out, place, say)
    wait_for_all(place.host["world"], "ready")
    return Run(
        loaded=loaded,
        place=place,
        model=model,
        processor=processor,
        loader=loader,
        held_out=held_out,
        step=step,
        state=state,
        eos_token_ids=eos,
    )


def alone(device: torch.device) -> Place:
    """The place of a run of one process."""
    one = single_mesh()
    return Place(device=device, mesh=one, host=one)


def find_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """The device of a name, tried out; of several ranks each takes that with its number on its machine.

    Raises ValueError for a device that torch does not have, and for one device for several ranks.
    """
    try:
        device = torch.device(name)
        if ranks is not None and ranks.size > 1 and device.type != "cpu":
            if device.index is not None:
                raise ValueError(
                    f"model.device {name!r} is one device but there are {ranks.size} ranks; set it to {device.type!r}"
                )
            device = torch.device(device.type, ranks.local)
        torch.zeros(1, device=device).item()  # also refuses meta, which holds no values
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"model.device {name!r} cannot be used by this torch {torch.__version__}; try 'cpu'"
        ) from error
    return device


def load_model(section: ModelSection, seed: int, device: torch.device | None = None) -> Model:
    """The whole model, loaded or random, on `device` (default: that of the section)."""
    device, dtype = device or find_device(section.device), getattr(torch, section.dtype)
    if section.init == "load":
        return load_hf(section.path, dtype=dtype, device=device)
    model = init(read_config(Path(section.path)), seed, dtype)
    return replace(model, params=tree.map(lambda leaf: leaf.to(device), model.params))


def check_attention(config: Config, device: torch.device) -> None:
    """Raise ValueError for a kind of context parallelism whose attention has no kernel for the device yet."""
    kind = config.layout.kind
    if config.layout.cp > 1 and kind != "ulysses" and device.type != "cpu":
        raise ValueError(
            f"layout.kind {kind!r} needs attention blocks with log-sum-exp, which there are on the CPU only, not on "
            f"{device.type}; use layout.kind=ulysses"
        )


def load_shards(config: Config, place: Place) -> Model:
    """The model with this rank's shards. Every rank has the whole model in the host's memory while it cuts them."""
    if place.mesh.layout.world == 1:
        return load_model(config.model, config.train.seed, place.device)
    model = load_model(config.model, config.train.seed, torch.device("cpu"))
    specs = model.family.specs(model.cfg)
    cut = tree.map(lambda leaf, spec: shard(leaf, sharding_of(spec, place.mesh), place.device), model.params, specs)
    return replace(model, params=cut)


def load_model_processor(path: str, template: str | None = None) -> Processor:
    """Tokenizer, chat template and image settings of a model's folder; `template` names a jinja file to use instead.

    Raises ValueError for a folder that is missing or incomplete, first of all one without a readable config.json.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"model.path {path!r} is no folder; give the folder of a Hugging Face checkpoint")
    read_config(folder)  # before the tokenizer, whose loader reads the file too and blames itself
    if template is None:
        return load_processor(folder)
    try:
        source = Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.template {template!r} cannot be read ({error}); give a text file") from error
    return load_processor(folder, source)


def open_dataset(config: Config, path: str, processor: Processor) -> Dataset:
    """One of the config's data files, checked as far as it can be without opening media."""
    return Dataset(
        path,
        processor,
        media_root=config.data.root,
        max_tokens=config.data.max_tokens,
        cache_bytes=config.data.cache_mib * 2**20,
    )


def check_match(model: Model, processor: Processor) -> None:
    """Raise ValueError unless the processor makes what the model reads: the same patches, tokens it has."""
    vision, image = model.cfg.vision, processor.image
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        if getattr(vision, name) != getattr(image, name):
            raise ValueError(
                f"{name} is {getattr(vision, name)} in config.json but {getattr(image, name)} in "
                "preprocessor_config.json; use the two files of one model"
            )
    if vision.patch_values != image.patch_values:
        raise ValueError(
            f"in_channels is {vision.num_channels} in config.json, {vision.patch_values} values per patch, but images "
            f"give {image.patch_values}; use a model for 3 channels"
        )
    largest = max(processor.chat.tokenizer.get_vocab().values())
    if largest >= model.cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has token id {largest} but the model's vocab_size is {model.cfg.vocab_size}; use the "
            "tokenizer of the model"
        )
    vocabulary = processor.chat.tokenizer.get_vocab()
    for key, token in MEDIA_TOKENS.items():
        configured = getattr(model.cfg, key, model.hf_config.get(key))  # the first has the defaults of absent keys
        if configured is not None and configured != vocabulary.get(token):
            raise ValueError(
                f"{key} is {configured} in config.json but {token!r} is {vocabulary.get(token)} in the tokenizer; use "
                "the tokenizer of the model"
            )


def build_loader(config: Config, dataset: Dataset, model: Model, program: Program) -> Loader:
    """The loader of a data set for a model and the share of it that a program computes."""
    vision, kind, layout = model.cfg.vision, config.layout.kind, program.mesh.layout
    least = token_multiple(kind, layout) if layout.cp > 1 else 1
    if odd := [size for size in config.data.token_buckets if size % least]:
        raise ValueError(
            f"data.token_buckets has {odd[0]} but layout.kind {kind!r} with cp {layout.cp} needs multiples of {least}; "
            f"use {-(-odd[0] // least) * least}"
        )
    return Loader(
        dataset,
        lambda sample: model.family.positions(sample, model.cfg),
        batch_samples=config.data.batch_samples,
        token_buckets=config.data.token_buckets,
        patch_buckets=config.data.patch_buckets,
        seed=config.train.seed,
        merge_size=vision.merge_size,
        patch_values=vision.patch_values,
        axis=program.mesh["batch"],
        split=program.split,
        segment_multiple=segment_multiple(kind, layout),
    )


def layout_of(section: LayoutSection) -> Layout:
    """The sizes of the mesh. Raises ValueError for sizes that do not fit together."""
    ulysses = {"ulysses": section.cp, "usp": section.ulysses}.get(section.kind, 1)
    return Layout(replicate=section.replicate, dp=section.dp, cp=section.cp, ulysses=ulysses, ep=section.ep)


def build_program(config: Config, family: Family, cfg: Any, mesh: Mesh) -> Program:
    """How a rank of `mesh` runs a model under a config. Raises ValueError for a layout the model cannot take."""
    chosen = config.layout
    compute, reduce = (name and getattr(torch, name) for name in (chosen.compute_dtype, chosen.reduce_dtype))
    transforms = [
        context_parallel(
            kind=chosen.kind,
            num_heads=cfg.decoder.num_heads,
            num_kv_heads=cfg.decoder.num_kv_heads,
            merge_size=cfg.vision.merge_size,
            matmul_patches=2 * cfg.vision.d_model + cfg.vision.d_ff,
        ),
        expert_parallel("dropless" if chosen.capacity is None else "capacity", capacity=chosen.capacity),
        remat(chosen.remat, save=chosen.remat_save if chosen.remat == "selective" else (), every=chosen.remat_every),
        data_parallel(prefetch=chosen.prefetch, keep_gathered=chosen.keep_gathered),
        compiled(config.train.compile),
    ]
    if compute is not None or reduce is not None:
        transforms.append(precision(compute=compute, reduce=reduce))
    return pipe(Program.of(family.specs(cfg), mesh=mesh), *transforms)


def build_optimizer(chosen: OptimizerSection) -> optim.Transform:
    """The optimizer of a config."""
    adamw = optim.adamw(betas=chosen.betas, eps=chosen.eps, weight_decay=chosen.weight_decay, no_decay=chosen.no_decay)
    clip = [] if chosen.clip_norm is None else [optim.clip_by_global_norm(chosen.clip_norm)]
    return optim.chain(*clip, adamw)


def build_step(config: Config, model: Model, program: Program) -> tuple[Step, State]:
    """The step of a config and the state before it."""
    optimizer = build_optimizer(config.optimizer)
    step = make_step(
        model.family, model.cfg, program, config.objective.name, optimizer, schedule=_schedule(config), donate=True
    )
    return step, init_state(model.params, optimizer)


def check_data(
    config: Config,
    loader: Loader,
    train_set: Dataset,
    held_out: Dataset | None,
    place: Place,
    say: Callable[[str], None],
) -> None:
    """Prepare samples once, as `data.check` says, so that a broken file is found before training and not in the middle.

    Of all samples each rank prepares its part. The prepared samples stay in the cache. Raises ValueError for the first
    sample of the data that fails.
    """

    def check_sample(index: int) -> None:
        sample = train_set.sample(index)
        if not bool((sample.labels_T != IGNORE).any()):
            raise ValueError(
                f"sample {sample.id!r} of {str(train_set.path)!r} has nothing to learn; give it a turn of the "
                "assistant or remove it"
            )
        loader.check_fits(sample)

    def check_prompt(index: int) -> None:
        if held_out is not None:
            held_out.prompt(index)

    if config.data.check == "first":
        _drain(map(check_sample, loader.own(0)))
        loader.share(0)
        check_prompt(0)
        return
    world = place.host["world"]
    num_held_out = len(held_out) if held_out is not None else 0
    say(f"checking {len(train_set)} training and {num_held_out} held-out samples")
    with ThreadPoolExecutor(max_workers=max(1, config.data.workers), thread_name_prefix="mmfn-check") as pool:
        try:
            _drain(pool.map(check_sample, range(world.index, len(train_set), world.size)))
            _drain(pool.map(check_prompt, range(world.index, num_held_out, world.size)))
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise


def eos_token_ids(folder: Path, processor: Processor, vocab_size: int) -> tuple[int, ...]:
    """Tokens that end an answer: those of generation_config.json, or else the tokenizer's own.

    Raises ValueError for a file that is no JSON object, or ids that are no tokens of the model.
    """
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.exists() else None
    if found is None:
        found = processor.chat.tokenizer.eos_token_id
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise ValueError(
            f"eos_token_id is {found!r} in {str(path)!r} but must be a token id below vocab_size {vocab_size}, or a "
            "list of them; correct the file"
        )
    return tuple(ids)


def _schedule(config: Config) -> Schedule:
    chosen = config.schedule
    return schedule(
        chosen.kind,
        peak=config.optimizer.lr,
        num_steps=config.train.steps,
        warmup_steps=chosen.warmup_steps,
        final_scale=chosen.final_scale,
    )


def _drain(results: Iterable[Any]) -> None:
    for _ in results:
        pass
