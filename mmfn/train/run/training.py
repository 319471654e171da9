"""A training run from its first step to its report: the loop, then checkpoint, evaluation and report in its folder."""

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from mmfn.parallel.mesh.host_values import wait_for_all
from mmfn.parallel.weights.hosted import to_device
from mmfn.train.build.forward import build_forward
from mmfn.train.build.run import Run
from mmfn.train.optim import ema_params
from mmfn.train.report.log import read_steps
from mmfn.train.report.run_report import render_run
from mmfn.train.run import folder as run_folder
from mmfn.train.run.evaluate import Evaluation, evaluate, to_json
from mmfn.train.run.progress import Progress
from mmfn.train.run.recorded import train_recorded
from mmfn.train.run.result import Result
from mmfn.train.run.resume import resume_
from mmfn.train.run.save import save_trained
from mmfn.train.watch import Watch
from mmfn.tree import Tree


def run_training(run: Run, progress: Progress, watch: Watch | None = None) -> Result:
    """Make the run folder, train, then write checkpoint, evaluation and report into it. The first rank writes.

    A run goes on in its folder from its newest checkpoint. Every file but the growing
    metrics.jsonl appears complete or not at all; an earlier run stays in `previous` until all of them are there. The
    run's state is consumed. Parameters are saved first, each rank its shards; then a held-out set is answered on them.
    Raises ValueError for data that turn out broken on the way (with `data.check: all` there are none) and for a
    training that diverged, and OSError when the folder cannot be written. `watch`: what it is asked for on the way, for
    which all ranks raise `Stop` once that is saved. Behind the last step the model is saved first. No other run may be
    at work in the folder.
    """
    folder = run_folder.locate(run.loaded.config.output.path)
    with run_folder.claimed(folder) if run.place.is_first else nullcontext():
        result = _train(run, folder, progress, watch or Watch())
        wait_for_all(run.place.host["world"], "results")  # what the first rank cannot write ends all
    return result


def _train(run: Run, folder: Path, progress: Progress, watch: Watch) -> Result:
    config = run.loaded.config
    start = resume_(run, folder)
    began = time.perf_counter()
    state, tally = train_recorded(run, folder, progress, start, watch)
    watch.enter("saving the model")
    train_s = time.perf_counter() - began
    params = to_device(state["params"], run.place.device)  # where they may not lie (`layout.offload`)
    params = ema_params({**state, "params": params}) if config.output.weights == "ema" else params
    del state
    run.state.clear()  # what comes now has the optimizer's memory
    model = replace(run.model, params=params)
    saved = save_trained(run, params, folder)
    watch.loss, watch.is_saving = f"its model is in {folder}, evaluation and report are not", False
    evaluation = _evaluate(run, params, progress, watch)
    result = Result(
        folder=folder,
        saved=saved,
        model=model,
        tally=tally,
        evaluation=evaluation,
        train_s=train_s,
    )
    log = read_steps(folder) if run.place.is_first else None
    if log is not None:
        if evaluation is not None:
            run_folder.write_text(folder / "eval.json", to_json(evaluation))
        run_folder.write_text(folder / "report.html", render_run(run, result, log))
    result.check_usable(log, run.place.host["world"])
    if run.place.is_first:
        run_folder.drop_previous(folder)
    return result


def _evaluate(run: Run, params: Tree, progress: Progress, watch: Watch) -> Evaluation | None:
    """Evaluation of trained parameters (this rank's shards), or None without a held-out set."""
    if run.held_out is None:
        return None
    if run.place.is_first:
        progress.say(f"evaluating {len(run.held_out)} held-out samples")
    section = run.loaded.config.eval
    watch.enter("evaluation")
    return evaluate(
        build_forward(run.loaded.config, replace(run.model, params=params), run.place, run.specs),
        run.held_out,
        batch_samples=section.batch_samples,
        max_new_tokens=section.max_new_tokens,
        eos_token_ids=run.eos_token_ids,
        on_batch=lambda num_done: watch.enter("evaluation"),
    )
