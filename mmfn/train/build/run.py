"""From a config to a whole run, top to bottom: everything a user can get wrong is found here.

Nothing is written. A run folder is made only after `prepare` has returned.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmfn.interop import adapter, export
from mmfn.model import Model
from mmfn.parallel.mesh.host_values import wait_for_all
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import single_mesh
from mmfn.train.build.agreement import check_same, files_in_common, settings_in_common
from mmfn.train.build.data import build_loader, check_data, open_dataset
from mmfn.train.build.match import check_match
from mmfn.train.build.model import check_model, find_device, find_family
from mmfn.train.build.processor import eos_token_ids, load_model_processor
from mmfn.train.build.program import build_program
from mmfn.train.build.shards import load_shards
from mmfn.train.build.step import build_objective, build_step, loss_notes
from mmfn.train.config.load import Loaded
from mmfn.train.data import Dataset, Loader, Processor
from mmfn.train.objective import Objective, loss_terms
from mmfn.train.run.folder import check_output
from mmfn.train.run.source import stored_cursor
from mmfn.train.run.trackers import check_installed
from mmfn.train.step import State, Step
from mmfn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Run:
    """A checked run. `state` before the first step holds the model's own parameters, which training overwrites.

    On a mesh the model's parameters are this rank's shards. `specs` are those of its parameters: see `model_specs`.
    `is_restored`: they have no values yet, which a checkpoint has.
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
    is_restored: bool = False

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """Names of the metrics that make up the loss, where it has several."""
        return loss_terms(self.objective, self.model.family, self.model.cfg)


def alone(device: torch.device) -> Place:
    """The place of a run of one process."""
    one = single_mesh()
    return Place(device=device, mesh=one, host=one)


def prepare(
    loaded: Loaded, say: Callable[[str], None], place: Place | None = None, *, is_restored: bool = False
) -> Run:
    """Load and check everything a training run needs; `say` is given a line about what takes time.

    `place`: by default this process alone. Its ranks check the data together, and return when all of them are done.
    `is_restored`: the run goes on from a checkpoint, so that no value of its weights is read before.
    Raises ValueError, one sentence, for whatever is missing, broken or does not fit together.
    """
    config = loaded.config
    place = place or alone(find_device(config.model.device))
    world = place.host["world"]
    check_same(settings_in_common(config), world)
    if place.is_first:  # the one that writes
        check_output(loaded)
        check_installed(config.log)
    objective = build_objective(config.objective)  # an unknown name is found first
    processor = load_model_processor(config.model.path, config.data.chat, config.data.media_settings)
    train_set = open_dataset(config.data, config.data.train, processor, config.data.max_samples)
    held_out = open_dataset(config.data, config.data.eval, processor) if config.data.eval is not None else None
    if world.size > 1:
        check_same(files_in_common(config, {"data.train": train_set, "data.eval": held_out}), world)
    family, cfg = find_family(config.model)
    check_model(config, family, cfg)
    export.check_layout(family.specs(cfg), family.key_map(cfg), config.output.experts)
    program = build_program(config, family, cfg, place.mesh)
    if config.has_adapters and config.output.adapter != "merged":  # what peft's format cannot express is refused now
        adapter.disk_tensors(program.specs, family.specs(cfg), family.key_map(cfg))
    model = load_shards(config, place, is_restored=is_restored)
    check_match(model, processor)
    eos = eos_token_ids(Path(config.model.path), processor, model.cfg.vocab_size)
    idle = [f"note: {note}" for note in loaded.notes]
    for note in (*idle, *program.notes, *loss_notes(model, objective)):
        say(note)
    loader = build_loader(config, train_set, model, program, place.host["batch"], world)
    if is_restored and (before := stored_cursor(loaded, world)) is not None:
        loader.resume(before)  # other data are refused before they are looked at whole
    if config.train.steps is None:
        loaded = with_steps(loaded, loader, say)
        config = loaded.config
        check_model(config, family, cfg)  # what rules say of steps
    step, state = build_step(config, model, program, place.device)
    check_data(config, loader, held_out, place, say)
    wait_for_all(world, "ready")
    return Run(
        loaded=loaded,
        place=place,
        model=model,
        specs=program.specs,
        processor=processor,
        loader=loader,
        held_out=held_out,
        objective=objective,
        step=step,
        state=state,
        eos_token_ids=eos,
        is_restored=is_restored,
    )


def with_steps(loaded: Loaded, loader: Loader, say: Callable[[str], None]) -> Loaded:
    """The config with the number of steps in place of `train.epochs`. All ranks call it."""
    train, num = loaded.config.train, len(loader.dataset)
    assert train.epochs is not None, "a rule asks for steps or epochs"
    if loaded.config.data.batch_tokens is not None and not loader.has_counted(train.epochs):
        say(f"measuring {num:,} samples, to know how many steps train.epochs={train.epochs} takes")
    section = train.model_copy(update={"steps": loader.count_steps(train.epochs), "epochs": None})
    origins = {**loaded.origins, "train.steps": f"train.epochs={train.epochs}"}
    origins.pop("train.epochs", None)
    say(f"train.epochs={train.epochs} of {num} samples: {section.num_steps} steps")
    return replace(loaded, config=loaded.config.model_copy(update={"train": section}), origins=origins)
