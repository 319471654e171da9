"""What a run's report says: its tiles, its facts, and where things are."""

from collections.abc import Sequence

from mmfn import tree
from mmfn.spec import num_trained
from mmfn.train.build.run import Run
from mmfn.train.config.load import describe
from mmfn.train.data.skips import KINDS
from mmfn.train.report.page import render_report
from mmfn.train.run.progress import format_duration
from mmfn.train.run.record import RATE_STEPS
from mmfn.train.run.result import Result


def render_run(run: Run, result: Result) -> str:
    """The page of a run, as HTML text."""
    config = run.loaded.config
    tokens = sum(r["tokens"] for r in result.records)
    num_params = sum(leaf.numel() for leaf in tree.leaves(result.model.params))
    tiles = [
        ("training time", format_duration(result.train_s)),
        ("tokens per second", f"{tokens / result.train_s:,.0f}"),
        ("training loss", _last_mean(result, "loss")),
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


def _last_mean(result: Result, name: str) -> str:
    """A metric over the last steps."""
    last = result.records[-RATE_STEPS:]
    return f"{sum(r[name] for r in last) / len(last):.4f}"


def _report_facts(run: Run, result: Result, tokens: int, num_params: int) -> Sequence[tuple[str, str]]:
    records = result.records
    padding = sum(r["padding"] for r in records) / len(records)
    waited = sum(r["wait_s"] for r in records)
    facts = [
        ("model", f"{run.loaded.config.model.path} ({result.model.family.name}, {run.loaded.config.model.init})"),
        ("parameters", f"{num_params:,}, of these {num_trained(run.specs):,} are trained"),
        ("tokens seen", f"{tokens:,}, of these {sum(r['media_tokens'] for r in records):,} from media"),
        ("supervised tokens", f"{sum(r['supervised'] for r in records):,}"),
        ("samples seen", f"{sum(r['samples'] for r in records):,} of {len(run.loader.dataset):,} different ones"),
        ("padding", f"{100 * padding:.1f} % of packed tokens"),
        *((f"training loss: {name}", _last_mean(result, name)) for name in run.loss_terms if name in records[-1]),
        ("time waiting for data", f"{format_duration(waited)}, {100 * waited / result.train_s:.1f} % of the training"),
        ("samples skipped or cut", ", ".join(f"{sum(r[k] for r in records):,} {k}" for k in (*KINDS, "cut"))),
        ("steps skipped (not finite, or spikes)", f"{sum(r['skipped'] for r in records)}"),
        *((name, str(path)) for name, path in result.saved.items()),
    ]
    if result.evaluation is not None:
        correct = f"{result.evaluation.num_correct} of {len(result.evaluation.answers)} exactly right"
        facts.insert(0, ("held-out answers", f"{correct}, in {result.evaluation.time_s:.1f} s"))
    return facts
