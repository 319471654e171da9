"""What a run's report says: its tiles, its facts, and where things are."""

from collections.abc import Sequence

from mmfn import tree
from mmfn.spec import num_trained
from mmfn.train.build.run import Run
from mmfn.train.config.load import describe
from mmfn.train.data.skips import KINDS
from mmfn.train.report.log import RunLog
from mmfn.train.report.page import render_report
from mmfn.train.run.progress import format_duration
from mmfn.train.run.result import Result


def render_run(run: Run, result: Result, log: RunLog) -> str:
    """The page of a run, as HTML text. `log`: its steps, as they were written."""
    config = run.loaded.config
    num_params = sum(leaf.numel() for leaf in tree.leaves(result.model.params))
    tiles = [
        ("time of steps", format_duration(log.sums["step_s"])),
        ("tokens per second", f"{log.sums['tokens'] / log.sums['step_s']:,.0f}"),
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
        facts=_report_facts(run, result, log, num_params),
        curves=log.curves,
        evaluation=result.evaluation,
        config=describe(run.loaded),
        num_images=config.output.report_images,
    )


def _last_mean(result: Result, name: str) -> str:
    """A metric over the last steps."""
    last = result.tally.last
    return f"{sum(r[name] for r in last) / len(last):.4f}"


def _report_facts(run: Run, result: Result, log: RunLog, num_params: int) -> Sequence[tuple[str, str]]:
    sums, waited = log.sums, log.sums["wait_s"]
    waiting = f"{format_duration(waited)}, {waited / sums['step_s']:.1%} of the time of steps"
    facts = [
        ("model", f"{run.loaded.config.model.path} ({result.model.family.name}, {run.loaded.config.model.init})"),
        ("parameters", f"{num_params:,}, of these {num_trained(run.specs):,} are trained"),
        ("tokens seen", f"{sums['tokens']:,}, of these {sums['media_tokens']:,} from media"),
        ("supervised tokens", f"{sums['supervised']:,}"),
        ("samples seen", f"{sums['samples']:,} of {len(run.loader.dataset):,} different ones"),
        ("padding", f"{100 * (sums['padding'] / log.num_steps):.1f} % of packed tokens"),
        *(
            (f"training loss: {name}", _last_mean(result, name))
            for name in run.loss_terms
            if name in result.tally.last[-1]
        ),
        ("time waiting for data", waiting),
        ("samples skipped or cut", ", ".join(f"{sums[k]:,} {k}" for k in (*KINDS, "cut"))),
        ("steps skipped (not finite, or spikes)", f"{sums['skipped']}"),
        *((name, str(path)) for name, path in result.saved.items()),
    ]
    if result.evaluation is not None:
        correct = f"{result.evaluation.num_correct} of {len(result.evaluation.answers)} exactly right"
        facts.insert(0, ("held-out answers", f"{correct}, in {result.evaluation.time_s:.1f} s"))
    return facts
