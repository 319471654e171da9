"""The training loop: steps over prefetched data, a record of every step, then checkpoint, evaluation and report.

Metrics are read one step late: a step is started before the numbers of the one before are asked for. (On an accelerator
reading them still waits for the step that was started last.)
"""

import json
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmfn import batch as packing
from mmfn import tree
from mmfn.interop import adapter
from mmfn.interop.hf import save_hf
from mmfn.lora import merge
from mmfn.model import Model
from mmfn.parallel.weights.hosted import to_device
from mmfn.parallel.weights.sharding import whole_on_host, whole_params
from mmfn.spec import num_trained
from mmfn.train.build.run import Run
from mmfn.train.config.load import describe
from mmfn.train.config.schema import TrainSection
from mmfn.train.data import Agreed, agree, prefetch
from mmfn.train.objective import weigh_by
from mmfn.train.optim import ema_params
from mmfn.train.report.page import render_report
from mmfn.train.run import folder as run_folder
from mmfn.train.run.evaluate import Evaluation, evaluate, to_json
from mmfn.train.run.progress import Progress, format_duration
from mmfn.train.step import Metrics, State
from mmfn.tree import Tree

RATE_STEPS = 20  # tokens per second are measured over so many steps
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left behind. `train_s`: time of all steps, without preparation and evaluation.

    `model`: on the first rank with whole parameters, in the host's memory; on another with its shards. `saved`: where
    the trained parameters are, by kind: "checkpoint", "adapter".
    """

    folder: Path
    saved: dict[str, Path]
    model: Model
    records: list[Record]
    evaluation: Evaluation | None
    train_s: float


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
    records: list[Record] = []
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
        write_text(folder / "report.html", _report(run, result))
    _check_finite(result)
    if run.place.is_first:
        run_folder.drop_previous(folder)
    return result


def _save(run: Run, model: Model, folder: Path) -> dict[str, Path]:
    """Write what was trained: a checkpoint with adapters merged into it, the adapters themselves, or both."""
    config, saved = run.loaded.config, {}
    if config.has_adapters and config.output.adapter != "merged":
        saved["adapter"] = folder / "adapter"
        adapter.save(saved["adapter"], model, run.specs, base=config.model.path)
    if not config.has_adapters or config.output.adapter != "separate":
        saved["checkpoint"] = folder / "checkpoint"
        plain = replace(model, params=merge(model.params))
        save_hf(saved["checkpoint"], plain, assets=config.model.path, layout=config.output.experts)
    return saved


def _train_recorded(run: Run, folder: Path, progress: Progress, records: list[Record]) -> State:
    """`train` with the run folder made before it, and every record shown and written."""
    has_previous = run_folder.make_room(folder)
    write_text(folder / "config.yaml", describe(run.loaded))
    with progress, open(folder / "metrics.jsonl", "w", encoding="utf-8") as log:

        def emit(record: Record) -> None:
            numbers = {name: value if math.isfinite(value) else None for name, value in record.items()}
            log.write(json.dumps(numbers) + "\n")  # JSON has no NaN
            log.flush()
            progress.show(record)
            records.append(record)

        if has_previous:
            progress.say(f"the earlier run is kept in {folder / run_folder.PREVIOUS} until this one is complete")
        return train(run, emit)


def train(run: Run, emit: Callable[[Record], None]) -> State:
    """Take all steps and return the last state; the run's own is consumed. `emit(record)` is called once per step.

    A record holds `step` (from 1), `loss`, `ce` if the loss has other terms, with routers `aux_loss` and `dropped` (see
    `objective.loss_fn`), `grad_norm`, `lr`, `skipped` (1: loss or gradients were not finite or a spike, nothing
    changed), `in_a_row` (skipped steps up to this one), the counts of its data (`tokens`, `supervised`, `image_tokens`,
    `samples`, `microbatches`, `padding` as a share), `wait_s` (time it waited for data), `step_s`, `tokens_per_s` (no
    padding, over the last steps) and `eta_s`.
    On a mesh counts are those of all ranks, `microbatches` the number each of them computes, and times this rank's.
    Raises ValueError on all ranks, one step late, when `train.max_skips` steps in a row were skipped.
    """
    config = run.loaded.config
    num_steps = config.train.steps
    batch_axis, empty = run.place.host["batch"], run.loader.empty()
    meter = _Meter(num_steps)
    state, started = run.state, None
    shares = prefetch(run.loader.share, 0, num_steps, workers=config.data.workers, ahead=config.data.ahead)

    def finish(facts: Record, metrics: Metrics) -> None:
        record = meter.finish(facts, metrics)
        emit(record)
        _check_skips(record, config.train)

    for step in range(1, num_steps + 1):
        asked = time.perf_counter()
        share = agree(next(shares), batch_axis, empty)
        facts = _facts(step, share, time.perf_counter() - asked)
        weighed = weigh_by(share.microbatches, run.objective, share.labels_DAN, batch_axis.index)
        state, metrics = run.step(state, [packing.to(b, run.place.device) for b in weighed])
        if started is not None:
            finish(*started)
        started = facts, metrics
    if started is not None:
        finish(*started)
    return state


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears complete or not at all: beside its place, then moved there."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.close()
            os.chmod(file.name, 0o644)  # temporary files are private
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


class _Meter:
    """Turns a step's metrics into numbers (waiting for the device) and its time into rates."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.last = time.perf_counter()
        self.first = 0.0  # when the first step was done: it may have compiled, so it says nothing about the rest
        self.window: deque[tuple[int, float]] = deque(maxlen=RATE_STEPS)

    def finish(self, facts: Record, metrics: Metrics) -> Record:
        """The complete record of a step that was started earlier."""
        names = ("loss", "ce", "aux_loss", "dropped", "grad_norm", "lr", "skipped", "in_a_row")
        numbers = {name: metrics[name].item() for name in names if name in metrics}
        now = time.perf_counter()
        step_s, self.last = now - self.last, now
        self.first = self.first or now
        self.window.append((facts["tokens"], step_s))
        tokens, seconds = map(sum, zip(*self.window, strict=True))
        done = facts["step"] - 1
        per_step_s = (now - self.first) / done if done else step_s
        return {
            "step": facts["step"],
            **numbers,
            **facts,
            "step_s": round(step_s, 6),
            "tokens_per_s": round(tokens / seconds, 1),
            "eta_s": round((self.num_steps - facts["step"]) * per_step_s, 1),
        }


def _facts(step: int, share: Agreed, wait_s: float) -> Record:
    counts = share.counts
    return {
        "step": step,
        "samples": counts.samples,
        "microbatches": len(share.microbatches),
        "tokens": counts.tokens,
        "supervised": counts.supervised_tokens,
        "image_tokens": counts.media_tokens,
        "padding": round(counts.padding_share, 4),
        "wait_s": round(wait_s, 6),
    }


def _check_skips(record: Record, chosen: TrainSection) -> None:
    """Raise ValueError where too many steps in a row were skipped to hope for better ones."""
    if record["in_a_row"] < chosen.max_skips:
        return
    fix = "lower optimizer.lr, check weights and data, or raise train.max_skips"
    if _is_finite(record):
        fix = (
            f"it was a spike, so raise train.spike_factor ({chosen.spike_factor:g}), change train.spike_window "
            f"({chosen.spike_window}; 0 looks for no spikes), lower optimizer.lr, or raise train.max_skips"
        )
    raise ValueError(
        f"{record['in_a_row']} steps in a row were skipped, the last of them step {record['step']} with loss "
        f"{record['loss']:.4g} and gradient norm {record['grad_norm']:.4g}; {fix}"
    )


def _is_finite(record: Record) -> bool:
    return math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])


def _check_finite(result: Result) -> None:
    """Raise ValueError for a run that is complete but of no use.

    A step that was taken was finite, and one that was skipped left the parameters as they were, so a few that are not
    finite at the end say nothing about them: it takes more of those than steps that were taken before.
    """
    fix = f"lower optimizer.lr or check weights and data (the run is in {str(result.folder)!r})"
    last, num_taken = result.records[-1], sum(not record["skipped"] for record in result.records)
    if num_taken == 0:
        raise ValueError(f"all {len(result.records)} steps were skipped, their loss or gradients not finite; {fix}")
    if last["in_a_row"] > num_taken and not _is_finite(last):
        raise ValueError(
            f"the training diverged, the loss of the last step is {last['loss']:.4g} and its gradient norm "
            f"{last['grad_norm']:.4g}, and {num_taken} of {len(result.records)} steps were taken; {fix}"
        )
    if result.evaluation is not None:
        result.evaluation.check_finite()


def _evaluate(run: Run, params: Tree, progress: Progress) -> Evaluation | None:
    """Evaluation of trained parameters (this rank's shards), or None without a held-out set."""
    if run.held_out is None:
        return None
    if run.place.is_first:
        progress.say(f"evaluating {len(run.held_out)} held-out samples")
    chosen = run.loaded.config.eval
    return evaluate(
        replace(run.model, params=whole_params(params, run.place.mesh)),
        run.held_out,
        batch_samples=chosen.batch_samples,
        max_new_tokens=chosen.max_new_tokens,
        eos_token_ids=run.eos_token_ids,
        axis=run.place.host["world"],
    )


def _report(run: Run, result: Result) -> str:
    config = run.loaded.config
    tokens = sum(r["tokens"] for r in result.records)
    num_params = sum(leaf.numel() for leaf in tree.leaves(result.model.params))
    last = result.records[-RATE_STEPS:]
    tiles = [
        ("training time", format_duration(result.train_s)),
        ("tokens per second", f"{tokens / result.train_s:,.0f}"),
        ("training loss", f"{sum(r['loss'] for r in last) / len(last):.4f}"),
    ]
    if result.evaluation is not None:
        tiles = [
            ("held-out accuracy", f"{100 * result.evaluation.accuracy:.1f} %"),
            ("held-out loss", f"{result.evaluation.loss:.4f}"),
            *tiles,
        ]
    return render_report(
        title=str(result.folder),
        subtitle=f"{result.model.family.name}, {num_params:,} parameters, {config.train.steps:,} steps",
        tiles=tiles,
        facts=_report_facts(run, result, tokens, num_params),
        metrics=result.records,
        evaluation=result.evaluation,
        config=describe(run.loaded),
        num_images=config.output.report_images,
    )


def _report_facts(run: Run, result: Result, tokens: int, num_params: int) -> Sequence[tuple[str, str]]:
    records = result.records
    padding = sum(r["padding"] for r in records) / len(records)
    facts = [
        ("model", f"{run.loaded.config.model.path} ({result.model.family.name}, {run.loaded.config.model.init})"),
        ("parameters", f"{num_params:,}, of these {num_trained(run.specs):,} are trained"),
        ("tokens seen", f"{tokens:,}, of these {sum(r['image_tokens'] for r in records):,} from images"),
        ("supervised tokens", f"{sum(r['supervised'] for r in records):,}"),
        ("samples seen", f"{sum(r['samples'] for r in records):,} of {len(run.loader.dataset):,} different ones"),
        ("padding", f"{100 * padding:.1f} % of packed tokens"),
        ("time waiting for data", format_duration(sum(r["wait_s"] for r in records))),
        ("steps skipped (not finite, or spikes)", f"{sum(r['skipped'] for r in records)}"),
        *((name, str(path)) for name, path in result.saved.items()),
    ]
    if result.evaluation is not None:
        correct = f"{result.evaluation.num_correct} of {len(result.evaluation.answers)} exactly right"
        facts.insert(0, ("held-out answers", f"{correct}, in {result.evaluation.time_s:.1f} s"))
    return facts
