"""`mmfn report`: several runs on one page, finished or going, of any length."""

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from mmfn import cli
from mmfn.train.build.run import prepare
from mmfn.train.config.load import load_config
from mmfn.train.report import chart
from mmfn.train.report.curves import FIGURES, NUM_STYLES, charts, style
from mmfn.train.report.log import CURVES, Curves, read_log
from mmfn.train.report.runs import differences, names_of, render_runs
from mmfn.train.run.progress import Progress
from mmfn.train.run.training import run_training
from tests.train.test_report import Resources

MakeConfig = Callable[..., Path]
WIDTH = chart.WIDTH - chart.LEFT - chart.RIGHT


def record(step: int, **changes: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(CURVES, 1.0 + step % 7)
    return {"step": step, **numbers, "tokens": 10, "skipped": 0, "began_at": 100, **changes}


def write(
    folder: Path, records: list[dict[str, Any]], *, end: str = "", skips: tuple[str, ...] = (), **settings: Any
) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + end)
    (folder / "config.yaml").write_text(json.dumps({"train": settings, "output": {"path": str(folder)}}))
    lines = [json.dumps({"step": 1, "place": i, "kind": "bad", "reason": reason}) for i, reason in enumerate(skips)]
    (folder / "skipped.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def lines_of(svg: ElementTree.Element, style: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, place.split(","))) for place in node.attrib["points"].split()]
        for node in svg.iter("polyline")
        if node.attrib["class"] == style
    ]  # type: ignore[misc]


def test_two_runs_side_by_side(make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real ones, by the command line, one of them resumed."""
    plain = {"data.eval": None, "data.check": "first"}

    def ran(name: str, *overrides: str, steps: int = 4) -> Path:
        config = make_config({**plain, "output.path": str(tmp_path / name / "run"), "train.steps": steps})
        run_training(
            prepare(load_config(config, overrides), say=lambda text: None),
            Progress(num_steps=steps, log_every=99, stream=io.StringIO()),
        )
        return tmp_path / name / "run"

    going = ("checkpoint.every=2", "checkpoint.resume=auto")
    one = ran("one", "optimizer.lr=0.0015")
    ran("two", *going)
    two = ran("two", *going, "train.peak_tflops=1", steps=6)
    out = tmp_path / "page.html"
    assert cli.main(["report", str(one), str(two), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out}"
    page = out.read_text()
    assert "one/run" in page
    assert "two/run" in page
    found = svgs(page)
    labels = [svg.attrib["aria-label"] for svg in found]
    assert labels[:5] == ["loss per supervised token", "gradient norm", "learning rate", "tokens per second", "MFU, %"]
    rates = lines_of(found[2], "run0") + lines_of(found[2], "run1")
    assert [len(line) for line in rates] == [4, 6]
    settings = dict(differences({"one": read_log(one).config, "two": read_log(two).config}))
    assert settings["train.steps"] == ["4", "6"]
    assert settings["optimizer.lr"][0] == "0.0015"
    assert "output.path" not in settings
    assert set(settings) == {
        *("optimizer.lr", "train.steps", "train.peak_tflops", "checkpoint.every"),
    }
    assert not {"script", "link", "iframe", "img"} & set(Resources(page).tags)
    assert not re.search(r"https?:|@import|url\(", page)


def test_a_run_that_is_still_going(tmp_path: Path) -> None:
    going = write(tmp_path / "going", [record(i) for i in range(1, 9)], end='{"step": 9, "lo')
    log = read_log(going)
    assert log.last["step"] == log.num_steps == 8
    assert log.num_unreadable == 0
    render_runs([log])
    whole = write(tmp_path / "whole", [record(i) for i in range(1, 9)], end=json.dumps(record(9)))
    assert (read_log(whole).num_steps, read_log(whole).num_unreadable) == (9, 0)  # as a run that goes on reads it
    broken = write(tmp_path / "broken", [record(1)], end='nonsense\n[]\n{"loss": 1}\n' + json.dumps(record(2)) + "\n")
    assert (read_log(broken).num_unreadable, read_log(broken).num_steps) == (3, 2)
    assert "3 lines of metrics.jsonl could not be read" in render_runs([read_log(broken)])
    empty = write(tmp_path / "empty", [])
    assert "<svg" not in render_runs([read_log(empty)])


def test_where_a_run_was_resumed(tmp_path: Path) -> None:
    starts = [(range(1, 5), 1_800_000_000), (range(5, 7), 1_800_003_600), (range(7, 20), 1_800_090_000)]
    records = [record(step, began_at=began) for steps, began in starts for step in steps]
    log = read_log(write(tmp_path / "run", records))
    assert log.resumed == [(4, 1_800_003_600), (6, 1_800_090_000)]
    page = render_runs([log])
    assert "behind step 4" in page
    assert "2027-01-15 09:00 UTC" in page
    cuts = [node for node in svgs(page)[0].iter("path") if node.attrib.get("class") == "cut"]
    assert [float(node.attrib["d"][1:].split()[0]) for node in cuts] == pytest.approx(
        [chart.LEFT + WIDTH * (step - 1) / 18 for step in (4, 6)], abs=0.1
    )


def test_skips_by_reason(tmp_path: Path) -> None:
    reasons = (*(f"image 'a{i}.png' ends at byte {i}" for i in range(12)), "no text")
    log = read_log(write(tmp_path / "run", [record(1)], skips=reasons))
    assert log.skips == {("bad", "image … ends at byte N"): 12, ("bad", "no text"): 1}
    assert "image … ends at byte N" in render_runs([log])


def test_evaluations_have_curves(tmp_path: Path) -> None:
    records = [record(i) for i in range(1, 30)]
    for i in (9, 19):
        records[i]["eval_loss"] = 3.0 - i / 10
    records.insert(15, {"step": 15, "eval_loss": 1.5, "eval_loss/images": 2.5})  # in a line of its own
    page = render_runs([read_log(write(tmp_path / "run", records))])
    by_label = {svg.attrib["aria-label"]: svg for svg in svgs(page)}
    assert len(lines_of(by_label["eval_loss"], "run0")[0]) == 3
    assert len(list(by_label["eval_loss"].iter("circle"))) == 3
    assert len(lines_of(by_label["eval_loss/images"], "run0")[0]) == 1


def test_pointing_shows_the_values_of_every_run() -> None:
    runs = {"a": Curves(), "b<": Curves()}
    for step in range(1, 21):
        runs["a"].add({"step": step, "lr": step / 8})
    for step in range(11, 41):
        runs["b<"].add({"step": step, "lr": 2.0 + step})
    ((_, text),) = charts(runs)
    groups = [
        [span.text for span in group.iter("tspan")]
        for group in ElementTree.fromstring(text).iter("g")
        if group.attrib["class"] == "at"
    ]
    assert len(groups) == 40
    assert groups[0] == ["step 1", "a 0.125", "b< 13"]  # where a run has no value, that of its nearest step
    assert groups[19] == ["step 20", "a 2.5", "b< 22"]
    assert groups[39] == ["step 40", "a 2.5", "b< 42"]


def test_a_spike_in_a_million_steps_stays() -> None:
    steps = np.arange(1.0, 1_000_001)
    values = np.sin(steps / 1e5)
    values[123_456], values[654_321] = 9.0, -7.0
    found = chart.thin(np.stack([steps, values], 1))
    assert len(found) <= 2 * chart.COLUMNS + 2
    assert {9.0, -7.0} <= set(found[:, 1])
    assert (np.diff(found[:, 0]) > 0).all()
    assert found[0, 0] == 1
    assert found[-1, 0] == 1e6
    column, of_found = (
        np.minimum((x - 1) / (1e6 - 1) * chart.COLUMNS, chart.COLUMNS - 1).astype(int) for x in (steps, found[:, 0])
    )
    for i in (0, 150, 299):
        inside = values[column == i]
        assert {inside.min(), inside.max()} <= set(found[of_found == i, 1])


@pytest.mark.slow
def test_a_million_steps(tmp_path: Path) -> None:
    """A bounded page, and 16 bytes a number in memory."""
    folder = write(tmp_path / "run", [])
    line = json.dumps(record(0, loss=0.0)).replace('"step": 0', '"step": %d').replace('"loss": 0.0', '"loss": %r')
    with open(folder / "metrics.jsonl", "w") as file:
        for i in range(1, 1_000_001):
            file.write(line % (i, math.exp(-i / 3e5)) + "\n")
    log = read_log(folder)
    assert log.num_steps == 1_000_000
    page = render_runs([log])
    assert len(page) < 600_000
    assert sum(16 * len(log.curves.points(name)) for name in CURVES) == 16 * 1_000_000 * len(CURVES)


def test_names_tell_runs_apart() -> None:
    assert names_of([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert names_of([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert names_of([Path("/x/a"), Path("/x/a"), Path("/y/c/a")]) == ["x/a", "x/a (2)", "c/a"]


def test_every_style_is_in_the_page(tmp_path: Path) -> None:
    logs = [read_log(write(tmp_path / f"r{i}", [record(1), record(2)])) for i in range(NUM_STYLES + 1)]
    page = render_runs(logs)
    assert all(f".run{i} {{" in page for i in range(NUM_STYLES))
    assert style(NUM_STYLES) == "run0 dashed"
    assert all(figure.key in CURVES for figure in FIGURES)


def test_all_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    records = [record(1, **{f"eval_{evil}": 1.0})]
    logs = [
        read_log(write(tmp_path / "a" / "<b>", records, skips=(evil,), seed=evil)),
        read_log(write(tmp_path / "c" / "<b>", records, skips=(evil,), seed="&")),
    ]
    page = render_runs(logs)
    assert "<script" not in page
    assert "<b>" not in page


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "'nowhere' holds no metrics.jsonl, so it is no run"),
        (["run", "--out", "run"], "--out 'run' is a folder; give the path of a file"),
        (["run", "--out", "gone/page.html"], "lies in a folder that does not exist; make the folder first"),
        (["run", "--out", "run/metrics.jsonl"], "--out 'run/metrics.jsonl' is there and was not written by this"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run", [record(1)])
    assert cli.main(["report", *arguments]) == 2
    assert sentence in capsys.readouterr().err
