"""From a config to everything a run needs: model, data, step. All that a user can get wrong is found here.

Nothing is written. A run folder is made only after `prepare` has returned.
"""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmfn import tree
from mmfn.batch import Sample
from mmfn.interop.checkpoint import read_config
from mmfn.interop.hf import init, load_hf
from mmfn.model import Model
from mmfn.parallel.program import Program, compiled, pipe
from mmfn.train import optim
from mmfn.train.config import Config, Loaded, ModelSection
from mmfn.train.data import Dataset, Loader, Processor, load_processor
from mmfn.train.objective import resolve
from mmfn.train.schedule import Schedule, schedule
from mmfn.train.step import State, Step, init_state, make_step

RUN_FILES = ("config.yaml", "metrics.jsonl", "eval.json", "report.html", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A checked run. `state` before the first step holds the model's own parameters, which training overwrites."""

    loaded: Loaded
    model: Model
    processor: Processor
    loader: Loader
    held_out: Dataset | None
    step: Step
    state: State
    eos_token_ids: tuple[int, ...]


def prepare(loaded: Loaded, say: Callable[[str], None]) -> Run:
    """Load and check everything a training run needs; `say` is given a line about what takes time.

    Raises ValueError, one sentence, for whatever is missing, broken or does not fit together.
    """
    config = loaded.config
    check_output(config)
    resolve(config.objective.name)
    processor = load_model_processor(config.model.path, config.data.template)
    train_set = open_dataset(config, config.data.train, processor)
    held_out = open_dataset(config, config.data.eval, processor) if config.data.eval is not None else None
    model = load_model(config.model, config.train.seed)
    check_match(model, processor)
    step, state = build_step(config, model)
    loader = build_loader(config, train_set, model)
    check_data(config, loader, train_set, held_out, say)
    return Run(
        loaded=loaded,
        model=model,
        processor=processor,
        loader=loader,
        held_out=held_out,
        step=step,
        state=state,
        eos_token_ids=eos_token_ids(Path(config.model.path), processor),
    )


def check_output(config: Config) -> None:
    """Raise ValueError unless the run folder is absent, empty, or an earlier run that may be overwritten."""
    folder = Path(config.output.path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output.path {str(folder)!r} is a file; give a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not config.output.overwrite:
        raise ValueError(f"output.path {str(folder)!r} is not empty; choose another or set output.overwrite=true")
    strange = sorted(entry.name for entry in folder.iterdir() if entry.name not in RUN_FILES)
    if strange:
        raise ValueError(
            f"output.path {str(folder)!r} holds {strange[0]!r}, which no run wrote; choose another folder or move it"
        )


def load_model(section: ModelSection, seed: int) -> Model:
    """The model on its device, loaded or random. Raises ValueError for a device that torch does not have."""
    device, dtype = _device(section.device), getattr(torch, section.dtype)
    if section.init == "load":
        return load_hf(section.path, dtype=dtype, device=device)
    model = init(read_config(Path(section.path)), seed, dtype)
    return replace(model, params=tree.map(lambda leaf: leaf.to(device), model.params))


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
    largest = max(processor.chat.tokenizer.get_vocab().values())
    if largest >= model.cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has token id {largest} but the model's vocab_size is {model.cfg.vocab_size}; use the "
            "tokenizer of the model"
        )


def build_loader(config: Config, dataset: Dataset, model: Model) -> Loader:
    """The loader of a data set for a model."""
    vision = model.cfg.vision
    return Loader(
        dataset,
        lambda sample: model.family.positions(sample, model.cfg),
        batch_samples=config.data.batch_samples,
        token_buckets=config.data.token_buckets,
        patch_buckets=config.data.patch_buckets,
        seed=config.train.seed,
        merge_size=vision.merge_size,
        patch_values=vision.patch_values,
    )


def build_step(config: Config, model: Model) -> tuple[Step, State]:
    """The step of a config and the state before it."""
    program = pipe(Program.of(model.family.specs(model.cfg)), compiled(config.train.compile))
    chosen = config.optimizer
    adamw = optim.adamw(betas=chosen.betas, eps=chosen.eps, weight_decay=chosen.weight_decay, no_decay=chosen.no_decay)
    clip = [] if chosen.clip_norm is None else [optim.clip_by_global_norm(chosen.clip_norm)]
    optimizer = optim.chain(*clip, adamw)
    step = make_step(
        model.family, model.cfg, program, config.objective.name, optimizer, schedule=_schedule(config), donate=True
    )
    return step, init_state(model.params, optimizer)


def check_data(
    config: Config, loader: Loader, train_set: Dataset, held_out: Dataset | None, say: Callable[[str], None]
) -> None:
    """Prepare samples once, as `data.check` says, so that a broken file is found before training and not in the middle.

    The prepared samples stay in the cache. Raises ValueError for the first sample of the data that fails.
    """
    if config.data.check == "first":
        loader.microbatches(0)
        if held_out is not None:
            held_out.prompt(0)
        return

    def check_sample(index: int) -> None:
        sample = train_set.sample(index)
        if not _fits(sample, config):
            loader.pack([sample])  # raises, with the sizes

    def check_prompt(index: int) -> None:
        if held_out is not None:
            held_out.prompt(index)

    num_held_out = len(held_out) if held_out is not None else 0
    say(f"checking {len(train_set)} training and {num_held_out} held-out samples")
    with ThreadPoolExecutor(max_workers=max(1, config.data.workers), thread_name_prefix="mmfn-check") as pool:
        try:
            _drain(pool.map(check_sample, range(len(train_set))))
            _drain(pool.map(check_prompt, range(num_held_out)))
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise


def eos_token_ids(folder: Path, processor: Processor) -> tuple[int, ...]:
    """Tokens that end an answer: those of generation_config.json, or else the tokenizer's own."""
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        found = None
    if found is None:
        found = processor.chat.tokenizer.eos_token_id
    return () if found is None else tuple(found) if isinstance(found, list) else (int(found),)


def _schedule(config: Config) -> Schedule:
    chosen = config.schedule
    return schedule(
        chosen.kind,
        peak=config.optimizer.lr,
        num_steps=config.train.steps,
        warmup_steps=chosen.warmup_steps,
        final_scale=chosen.final_scale,
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"model.device {name!r} cannot be used by this torch {torch.__version__}; try 'cpu'"
        ) from error
    return device


def _fits(sample: Sample, config: Config) -> bool:
    data = config.data
    return sample.tokens_T.numel() <= data.token_buckets[-1] and sample.num_patches <= data.patch_buckets[-1]


def _drain(results: Iterable[Any]) -> None:
    for _ in results:
        pass
