"""A training run from its first step to its report: the loop, then checkpoint, evaluation and report in its folder."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

from mmfn.interop import adapter
from mmfn.interop.hf import save_hf
from mmfn.lora import merge
from mmfn.model import Model
from mmfn.ops import table
from mmfn.parallel.weights.hosted import to_device
from mmfn.parallel.weights.sharding import whole_on_host, whole_params
from mmfn.train.build.run import Run
from mmfn.train.config.load import describe
from mmfn.train.optim import ema_params
from mmfn.train.report.run_report import render_run
from mmfn.train.run import folder as run_folder
from mmfn.train.run.evaluate import Evaluation, evaluate, to_json
from mmfn.train.run.folder import write_text
from mmfn.train.run.loop import StepRecord, train
from mmfn.train.run.progress import Progress
from mmfn.train.run.result import Result
from mmfn.train.step import State
from mmfn.tree import Tree


def run_training(run: Run, progress: Progress) -> Result:
    """Make the run folder, train, then write checkpoint, evaluation and report into it. The first rank writes.

    Every file but the growing metrics.jsonl appears complete or not at all; an earlier run stays in `previous` until
    all of them are there. The run's state is consumed. Parameters are saved first, made whole leaf by leaf in the first
    rank's host memory; then, with a held-out set, every rank holds them whole on its device to answer its part of it.
    Raises ValueError for data that turn out broken on the way (with `data.check: all` there are none) and for a
    training that diverged, and OSError when the folder cannot be written.
    """
    config = run.loaded.config
    folder = run_folder.locate(config.output.path)
    records: list[StepRecord] = []
    start = time.perf_counter()
    state = _train_recorded(run, folder, progress, records) if run.place.is_first else train(run, records.append)
    train_s = time.perf_counter() - start
    params = to_device(state["params"], run.place.device)  # where they may not lie (`layout.offload`)
    params = ema_params({**state, "params": params}) if config.output.weights == "ema" else params
    del state
    run.state.clear()  # what comes now has the optimizer's memory
    whole = whole_on_host(params, run.place.mesh, is_kept=run.place.is_first)
    model = replace(run.model, params=whole)
    saved = _save(run, model, folder) if run.place.is_first else {}
    evaluation = _evaluate(run, params, progress)
    result = Result(folder=folder, saved=saved, model=model, records=records, evaluation=evaluation, train_s=train_s)
    if run.place.is_first:
        if evaluation is not None:
            write_text(folder / "eval.json", to_json(evaluation))
        write_text(folder / "report.html", render_run(run, result))
    result.check_usable()
    if run.place.is_first:
        run_folder.drop_previous(folder)
    return result


def _train_recorded(run: Run, folder: Path, progress: Progress, records: list[StepRecord]) -> State:
    """`train` with the run folder made before it, and every record shown and written."""
    has_previous = run_folder.make_room(folder)
    write_text(folder / "config.yaml", describe(run.loaded))
    with progress, open(folder / "metrics.jsonl", "w", encoding="utf-8") as log:

        def emit(record: StepRecord) -> None:
            numbers = {name: value if math.isfinite(value) else None for name, value in record.items()}
            log.write(json.dumps(numbers) + "\n")  # JSON has no NaN
            log.flush()
            progress.show(record, run.loss_terms)
            records.append(record)

        if has_previous:
            progress.say(f"the earlier run is kept in {folder / run_folder.PREVIOUS} until this one is complete")
        return train(run, emit)


def _save(run: Run, model: Model, folder: Path) -> dict[str, Path]:
    """Write what was trained: a checkpoint with adapters merged into it, the adapters themselves, or both.

    Each gets `data.template`, if there is one, as its chat template: what it was trained with.
    """
    config, saved = run.loaded.config, {}
    if config.has_adapters and config.output.adapter != "merged":
        saved["adapter"] = folder / "adapter"
        adapter.save(saved["adapter"], model, run.specs, base=config.model.path)
    if not config.has_adapters or config.output.adapter != "separate":
        saved["checkpoint"] = folder / "checkpoint"
        plain = replace(model, params=merge(model.params))
        save_hf(saved["checkpoint"], plain, assets=config.model.path, layout=config.output.experts)
    if config.data.template is not None:
        for target in saved.values():
            write_text(target / "chat_template.jinja", run.processor.chat.templates[0])
    return saved


def _evaluate(run: Run, params: Tree, progress: Progress) -> Evaluation | None:
    """Evaluation of trained parameters (this rank's shards), or None without a held-out set."""
    if run.held_out is None:
        return None
    if run.place.is_first:
        progress.say(f"evaluating {len(run.held_out)} held-out samples")
    section = run.loaded.config.eval
    return evaluate(
        replace(run.model, params=whole_params(params, run.place.mesh)),
        run.held_out,
        batch_samples=section.batch_samples,
        max_new_tokens=section.max_new_tokens,
        eos_token_ids=run.eos_token_ids,
        ops=table(run.loaded.config.model.kernels),
        axis=run.place.host["world"],
    )
