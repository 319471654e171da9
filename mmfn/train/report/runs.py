"""One page for one or several runs, finished or still going: what they have done, side by side."""

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmfn.page import page_head
from mmfn.train.report.curves import charts, style
from mmfn.train.report.log import RunLog
from mmfn.train.report.template import render
from mmfn.train.run.progress import format_duration

HEAD = page_head("mmfn report")
NOT_COMPARED = ("output.path", "output.overwrite")  # of no effect on what is learned, or different by their nature
MOST_REASONS = 20


def render_runs(logs: Sequence[RunLog]) -> str:
    """The page as text. All text in it is escaped, and its size does not grow with the steps."""
    names = names_of([log.folder for log in logs])
    runs = dict(zip(names, logs, strict=True))
    cuts = [step for step, _ in logs[0].resumed] if len(logs) == 1 else []
    return render(
        "runs.html.jinja",
        head=HEAD,
        title=names[0] if len(names) == 1 else f"{len(names)} runs",
        runs=[(name, style(i)) for i, name in enumerate(names)],
        rows=_rows(runs),
        charts=charts({name: log.curves for name, log in runs.items()}, cuts),
        settings=differences({name: log.config for name, log in runs.items()}),
        skips=_skips(runs),
        resumed=[(name, step, _when(at)) for name, log in runs.items() for step, at in log.resumed],
        num_unreadable=sum(log.num_unreadable for log in logs),
    )


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart: `a/run` and `b/run`; a folder given twice is numbered."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    most = max(map(len, paths))
    for length in range(1, most + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [name if names.index(name) == i else f"{name} ({i + 1})" for i, name in enumerate(names)]


def differences(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """`(setting, its value in each run)` of the settings that are not the same in all of them."""
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    found = []
    for key in keys:
        values = ["" if key not in config else _text(config[key]) for config in configs.values()]
        if len(set(values)) > 1 and key not in NOT_COMPARED:
            found.append((key, values))
    return found


def _rows(runs: Mapping[str, RunLog]) -> list[tuple[str, list[str]]]:
    """`(figure, its value in each run)`."""
    columns = [_figures(log) for log in runs.values()]
    return [(name, [column[name] for column in columns]) for name in columns[0]]


def _figures(log: RunLog) -> dict[str, str]:
    last, sums = log.last, log.sums
    seconds = sums["step_s"] or 1.0
    total = log.config.get("train.steps")
    return {
        "steps": f"{last.get('step', 0):,}" + (f" of {total:,}" if isinstance(total, int) else ""),
        "loss of the last step": _number(last.get("loss"), "{:.4f}"),
        **{f"{key}, last": _number(last.get(key), "{:.4f}") for key in log.curves.evaluations[:4]},
        "time of steps": format_duration(sums["step_s"]),
        "still to go": format_duration(last.get("eta_s") or 0),
        "tokens": f"{sums['tokens']:,.0f}",
        "tokens per second": f"{sums['tokens'] / seconds:,.0f}",
        "MFU": _number(last.get("mfu"), "{:.1%}"),
        "waiting for data": f"{sums['wait_s'] / seconds:.1%} of the time",
        "memory": _number((last.get("memory_bytes") or 0) / 2**30, "{:.2f} GiB"),
        "steps skipped": f"{sums['skipped']:,.0f}",
        "samples skipped": f"{sum(log.skips.values()):,}",
        "times resumed": f"{len(log.resumed)}",
    }


def _skips(runs: Mapping[str, RunLog]) -> list[tuple[str, list[str]]]:
    """`(kind and reason, how many in each run)`, the most frequent first."""
    everywhere = sum((log.skips for log in runs.values()), type(next(iter(runs.values())).skips)())
    return [
        (f"{kind}: {reason}", [f"{log.skips[kind, reason]:,}" for log in runs.values()])
        for (kind, reason), _ in everywhere.most_common(MOST_REASONS)
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
