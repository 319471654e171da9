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
from mmfn.interop import adapter, export
from mmfn.interop.checkpoint import read_config
from mmfn.interop.hf import init, load_hf
from mmfn.lora import add_adapters, lora
from mmfn.model import Model
from mmfn.models import Family
from mmfn.ops.cross_entropy import power_of_two
from mmfn.parallel.context.token_order import segment_multiple, token_multiple
from mmfn.parallel.mesh.host_values import wait_for_all
from mmfn.parallel.mesh.launch import Place, Ranks
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.program import Transform as ProgramTransform
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.context_parallel import context_parallel
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.offload import OFFLOAD_KINDS, offload
from mmfn.parallel.transforms.precision import precision
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.transforms.vocabulary_parallel import vocabulary_parallel
from mmfn.parallel.weights.host_memory import HOST_DEVICE
from mmfn.parallel.weights.hosted import to_host
from mmfn.parallel.weights.sharding import shard_params
from mmfn.spec import freeze, num_params, num_trained, trained_paths
from mmfn.train.build.match import check_match
from mmfn.train.build.optimizer import build_guard, build_optimizer, build_schedule
from mmfn.train.config.effects import check_effects
from mmfn.train.config.load import Loaded
from mmfn.train.config.schema import Config, LayoutSection, ModelSection, ObjectiveSection
from mmfn.train.data import Dataset, Loader, Processor, load_processor
from mmfn.train.data.tokenizer import read_json
from mmfn.train.objective import Objective, resolve
from mmfn.train.run.folder import check_output
from mmfn.train.step import State, Step, init_state, make_step
from mmfn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Run:
    """A checked run. `state` before the first step holds the model's own parameters, which training overwrites.

    On a mesh the model's parameters are this rank's shards. `specs` are those of its parameters: see `model_specs`.
    """

    loaded: Loaded
    place: Place
    model: Model
    specs: Tree
    processor: Processor
    loader: Loader
    held_out: Dataset | None
    objective: Objective
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
    build_objective(config.objective)  # an unknown name is found first
    processor = load_model_processor(config.model.path, config.data.template)
    train_set = open_dataset(config, config.data.train, processor)
    held_out = open_dataset(config, config.data.eval, processor) if config.data.eval is not None else None
    place = place or alone(find_device(config.model.device))
    check_attention(config, place.device)
    model = load_shards(config, place)
    check_match(model, processor)
    check_effects(config, model.cfg, model.family.specs(model.cfg))
    export.check_layout(model.family.specs(model.cfg), model.family.key_map(model.cfg), config.output.experts)
    eos = eos_token_ids(Path(config.model.path), processor, model.cfg.vocab_size)
    program = build_program(config, model.family, model.cfg, place.mesh)
    for note in program.notes:
        say(note)
    if config.has_adapters and config.output.adapter != "merged":  # what peft's format cannot express is refused now
        adapter.disk_tensors(program.specs, model.family.specs(model.cfg), model.family.key_map(model.cfg))
    step, state = build_step(config, model, program, place.device)
    loader = build_loader(config, train_set, model, program)
    check_data(config, loader, train_set, held_out, place, say)
    wait_for_all(place.host["world"], "ready")
    return Run(
        loaded=loaded,
        place=place,
        model=model,
        specs=program.specs,
        processor=processor,
        loader=loader,
        held_out=held_out,
        objective=build_objective(config.objective),
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
    """The whole model, loaded or random, on `device` (default: that of the section), with its adapter if it has one."""
    device, dtype = device or find_device(section.device), getattr(torch, section.dtype)
    if section.init == "load":
        model = load_hf(section.path, dtype=dtype, device=device)
    else:
        model = init(read_config(Path(section.path)), seed, dtype)
        model = replace(model, params=tree.map(lambda leaf: leaf.to(device), model.params))
    return model if section.adapter is None else adapter.load(section.adapter, model)


def model_specs(config: Config, family: Family, cfg: Any) -> Tree:
    """The parameters of a run's model: those of the family, adapters, and what is frozen.

    Raises ValueError for a part the family does not have, for patterns that match nothing, and for freezing adapters.
    """
    specs, chosen = family.specs(cfg), config.lora
    if config.model.adapter is not None:
        specs = adapter.read(config.model.adapter, specs, family.key_map(cfg))
    elif chosen.rank is not None:
        specs = lora(
            specs,
            rank=chosen.rank,
            alpha=chosen.alpha,
            targets=chosen.targets,
            is_rs=chosen.rslora,
            dropout=chosen.dropout,
            keep=chosen.keep,
        )
    parts = family.parts(cfg)
    if absent := [name for name in config.freeze.parts if name not in parts]:
        raise ValueError(f"freeze.parts has {absent[0]!r} but this model's parts are {', '.join(parts)}; use these")
    patterns = [*(parts[name] for name in config.freeze.parts), *config.freeze.patterns]
    frozen = freeze(specs, patterns) if patterns else specs
    lost = set(trained_paths(specs)) - set(trained_paths(frozen))
    if patterns and not lost:
        raise ValueError("freeze has no effect: LoRA already freezes all that it covers; remove it")
    if adapters := [path for path in lost if "/lora/" in path]:
        raise ValueError(
            f"freeze covers the adapter {min(adapters)!r} but LoRA already freezes the weights; leave the part out of "
            "freeze, or out of lora.targets"
        )
    if config.model.adapter is not None and lost:
        raise ValueError(
            f"freeze covers {min(lost)!r}, which model.adapter holds in full and the adapter of this run would lack; "
            "leave it out of freeze"
        )
    return frozen


def trained_note(specs: Tree) -> tuple[str, ...]:
    """How much is trained, where it is not all."""
    trained, total = num_trained(specs), num_params(specs)
    return () if trained == total else (f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})",)


def check_attention(config: Config, device: torch.device) -> None:
    """Raise ValueError for a setting whose attention has no kernel for the device yet."""
    kind, compile_ = config.layout.kind, config.train.compile
    if compile_ != "none" and device.type != "cpu":
        raise ValueError(
            f"train.compile {compile_!r} needs attention that reads nothing on the host, which there is on the CPU "
            f"only, not on {device.type}; use train.compile=none"
        )
    if config.layout.cp > 1 and kind != "ulysses" and device.type != "cpu":
        raise ValueError(
            f"layout.kind {kind!r} needs attention blocks with log-sum-exp, which there are on the CPU only, not on "
            f"{device.type}; use layout.kind=ulysses"
        )


def load_shards(config: Config, place: Place) -> Model:
    """The model with this rank's shards. Every rank has the whole model in the host's memory while it cuts them.

    With `layout.offload` of parameters they stay in the host's memory, pinned for the device.
    """
    is_alone, seed = place.mesh.layout.world == 1, config.train.seed
    device = HOST_DEVICE if "parameters" in config.layout.offload else place.device
    model = load_model(config.model, seed, device if is_alone else HOST_DEVICE)
    specs = model_specs(config, model.family, model.cfg)
    params = add_adapters(model.params, specs, seed)
    if not is_alone:
        params = shard_params(params, specs, place.mesh, device)
    params = to_host(params, place.device) if device != place.device else params
    return replace(model, params=params)


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


def build_loader(config: Config, dataset: Dataset, model: Model, program: Program) -> Loader:
    """The loader of a data set for a model and the share of it that a program computes."""
    kind, layout = config.layout.kind, program.mesh.layout
    least = token_multiple(kind, layout) if layout.cp > 1 else 1
    if odd := [size for size in config.data.token_buckets if size % least]:
        raise ValueError(
            f"data.token_buckets has {odd[0]} but layout.kind {kind!r} with cp {layout.cp} needs multiples of {least}; "
            f"use {-(-odd[0] // least) * least}"
        )
    return Loader(
        dataset,
        lambda samples, sizes: model.family.pack(samples, model.cfg, sizes),
        model.family.towers(model.cfg),
        batch_samples=config.data.batch_samples,
        token_buckets=config.data.token_buckets,
        tower_buckets={"vision": config.data.patch_buckets},
        seed=config.train.seed,
        axis=program.mesh["batch"],
        split=program.split,
        segment_multiple=segment_multiple(kind, layout),
    )


def layout_of(section: LayoutSection) -> Layout:
    """The sizes of the mesh. Raises ValueError for sizes that do not fit together."""
    ulysses = {"ulysses": section.cp, "usp": section.ulysses}.get(section.kind, 1)
    return Layout(replicate=section.replicate, dp=section.dp, cp=section.cp, ulysses=ulysses, ep=section.ep)


def build_program(config: Config, family: Family, cfg: Any, mesh: Mesh, specs: Tree | None = None) -> Program:
    """How a rank of `mesh` runs a model under a config; `specs` are by default those of `model_specs`.

    Raises ValueError for a layout the model cannot take, and as `model_specs` does.
    """
    chosen = config.layout
    narrow = "bfloat16" if config.model.dtype == "bfloat16" else None  # of which what is sensitive is in float32 too
    names = (chosen.compute_dtype or narrow, chosen.reduce_dtype)
    compute, reduce = (None if name is None else getattr(torch, name) for name in names)
    transforms = [
        context_parallel(
            kind=chosen.kind,
            num_heads=cfg.decoder.num_heads,
            num_kv_heads=cfg.decoder.num_kv_heads,
            towers=family.towers(cfg),
        ),
        expert_parallel("dropless" if chosen.capacity is None else "capacity", capacity=chosen.capacity),
        *build_remat(chosen),
        *(offload(what) for what in chosen.offload if what in OFFLOAD_KINDS),
        data_parallel(prefetch=chosen.prefetch, keep_gathered=chosen.keep_gathered),
        compiled(config.train.compile),
    ]
    rules = chosen.compute_rules
    if compute is not None or reduce is not None or rules is not None:
        dtypes = None if rules is None else {pattern: getattr(torch, name) for pattern, name in rules.items()}
        transforms.append(precision(compute=compute, reduce=reduce, rules=dtypes))
    if chosen.head == "sharded":
        transforms.append(vocabulary_parallel())
    specs = specs or model_specs(config, family, cfg)
    return pipe(replace(Program.of(specs, mesh=mesh), notes=trained_note(specs)), *transforms)


def build_remat(chosen: LayoutSection) -> list[ProgramTransform]:
    """What is computed again: one policy for all stacks, or one for the text and one for the vision tower."""

    def build(key: str, where: str) -> ProgramTransform:
        kind, save = getattr(chosen, key), getattr(chosen, f"{key}_save")
        every, num_layers = getattr(chosen, f"{key}_every"), getattr(chosen, f"{key}_layers")
        return remat(kind, save=save if kind == "selective" else (), every=every, num_layers=num_layers, where=where)

    if chosen.remat_vision is None:
        return [build("remat", "all")]
    return [build("remat", "text"), build("remat_vision", "vision")]


def build_objective(chosen: ObjectiveSection) -> Objective:
    """The objective of a config. Raises ValueError for an unknown name."""
    total = chosen.total_chunk_size
    return replace(
        resolve(chosen.name),
        z_loss=chosen.z_loss,
        label_smoothing=chosen.label_smoothing,
        chunk=chosen.chunk_size if total is None else power_of_two(total),
    )


def build_step(
    config: Config, model: Model, program: Program, device: torch.device | None = None
) -> tuple[Step, State]:
    """The step of a config and the state before it; `device`: where it is computed, default where parameters lie."""
    optimizer, guard = build_optimizer(config, program.specs, device), build_guard(config)
    objective, rate = build_objective(config.objective), build_schedule(config)
    step = make_step(
        model.family, model.cfg, program, objective, optimizer, schedule=rate, guard=guard, seed=config.train.seed
    )
    return step, init_state(model.params, optimizer, program.specs, guard, device)


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


def _drain(results: Iterable[Any]) -> None:
    for _ in results:
        pass
