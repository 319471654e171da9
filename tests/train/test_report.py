"""report.html: self-contained, escaped, complete; charts that draw the numbers they are given; progress lines."""

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from mmfn.train.report.chart import RIGHT, WIDTH, Line, line_chart, smooth
from mmfn.train.report.log import Curves
from mmfn.train.report.page import choose, render_report
from mmfn.train.run.evaluate import Answer, Evaluation
from mmfn.train.run.progress import Progress, format_duration, format_line


def answer(index: int, prediction: str = "7", truth: str = "7", images: tuple[Path, ...] = ()) -> Answer:
    return Answer(id=f"s{index}", question="Which?", prediction=prediction, truth=truth, images=images)


def evaluation(*answers: Answer) -> Evaluation:
    return Evaluation(answers=answers, loss_sum=1.0, num_tokens=4, time_s=0.5)


def curves(*losses: float) -> Curves:
    found = Curves()
    for i, loss in enumerate(losses):
        found.add({"step": i + 1, "loss": loss if math.isfinite(loss) else None, "lr": 1e-3})
    return found


def page(**changes: Any) -> str:
    args: dict[str, Any] = {
        "title": "run",
        "subtitle": "sub",
        "tiles": [("accuracy", "98.9 %")],
        "facts": [("parameters", "1")],
        "curves": curves(*(3.0 / i for i in range(1, 30))),
        "evaluation": evaluation(answer(0)),
        "config": "model: {}",
    }
    return render_report(**{**args, **changes})


class Resources(HTMLParser):
    """Collects every attribute through which a page can load something, and every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_page_is_self_contained(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path)
    text = page(evaluation=evaluation(answer(0, images=(path,))))
    resources = Resources(text)
    assert resources.found
    assert all(value.startswith("data:image/png;base64,") for value in resources.found)
    assert not {"script", "link", "iframe"} & set(resources.tags)
    assert not re.search(r"https?:|@import|url\(", text)


def test_small_png_is_embedded_as_it_is_and_large_images_as_thumbnails(tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.jpg"
    Image.new("L", (8, 8), 200).save(small)
    Image.new("RGB", (900, 300), (10, 200, 30)).save(large)
    text = page(evaluation=evaluation(answer(0, images=(small, large))))
    first, second = (base64.b64decode(url.partition(",")[2]) for url in Resources(text).found)
    assert first == small.read_bytes()
    with Image.open(io.BytesIO(second)) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("PNG", (256, 85))
    assert text.count('class="tiny"') == 1


def test_all_text_is_escaped() -> None:
    evil = "<script>alert(1)</script>&\"'"
    bad = Answer(id=evil, question=evil, prediction=evil, truth=evil + "x")
    text = page(
        title=evil,
        subtitle=evil,
        tiles=[(evil, evil)],
        facts=[(evil, evil)],
        config=evil,
        evaluation=evaluation(bad),
    )
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)") >= 9


def test_wrong_answers_come_first_and_are_marked() -> None:
    answers = (answer(0), answer(1, prediction="1"), answer(2), answer(3, prediction=""))
    text = page(evaluation=evaluation(*answers))
    marks = re.findall(r'class="sample (right|wrong)"', text)
    assert marks == ["wrong", "wrong", "right", "right"]
    assert "2 of 4 are wrong" in text
    assert "(empty)" in text


@pytest.mark.parametrize(
    ("num_wrong", "num_right", "count", "expected"),
    [
        (10, 90, 20, (10, 10)),
        (30, 90, 20, (10, 10)),
        (3, 90, 20, (3, 17)),
        (30, 4, 20, (16, 4)),
        (2, 1, 20, (2, 1)),
        (5, 5, 0, (0, 0)),
    ],
)
def test_choose(num_wrong: int, num_right: int, count: int, expected: tuple[int, int]) -> None:
    answers = [answer(i, prediction="0" if i % 2 else "7") for i in range(2 * max(num_wrong, num_right))]
    wrong = [a for a in answers if not a.is_correct][:num_wrong]
    right = [a for a in answers if a.is_correct][:num_right]
    shown = choose([*right, *wrong], count)
    assert (sum(not a.is_correct for a in shown), sum(a.is_correct for a in shown)) == expected


def test_missing_image_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image '.*gone.png' cannot be shown in the report"):
        page(evaluation=evaluation(answer(0, images=(tmp_path / "gone.png",))))


@pytest.mark.parametrize("losses", [[], [math.nan]])
def test_page_without_curves_or_evaluation(losses: list[float]) -> None:
    text = page(curves=curves(*losses), evaluation=None)
    assert "<svg" not in text
    assert "Held-out samples" not in text


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(svg)
    return [
        [(float(x), float(y)) for x, y in (p.split(",") for p in node.attrib["points"].split())]
        for node in root.iter("polyline")
    ]


@pytest.mark.parametrize("is_log", [False, True])
def test_chart_maps_numbers_to_places(is_log: bool) -> None:
    values = [(0.0, 1.0), (10.0, 10.0), (20.0, 100.0)]
    (places,) = points_of(line_chart([Line(points=values)], x_label="x", y_label="y", is_log=is_log))
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 > y1 > y2  # larger values are higher up
    share = (y0 - y1) / (y0 - y2)
    assert share == pytest.approx(0.5 if is_log else 9 / 99, abs=0.01)


def test_chart_skips_what_cannot_be_drawn_and_thins_long_lines() -> None:
    values = [(float(i), math.inf if i == 3 else 1.0 + i) for i in range(10_000)]
    (places,) = points_of(line_chart([Line(points=values)], x_label="x", y_label="y"))
    assert len(places) < 2000
    assert places[-1][0] == pytest.approx(WIDTH - RIGHT)
    with pytest.raises(ValueError, match="no finite point"):
        line_chart([Line(points=[(0.0, math.nan)])], x_label="x", y_label="y")


def test_chart_of_one_point_and_of_a_flat_line() -> None:
    for values in ([(1.0, 0.0)], [(1.0, 5.0), (2.0, 5.0)]):
        (places,) = points_of(line_chart([Line(points=values, mark=True)], x_label="x", y_label="y"))
        assert all(math.isfinite(c) for place in places for c in place)


def test_smooth_is_an_unbiased_moving_average() -> None:
    assert smooth([(float(i), 2.0) for i in range(50)]).tolist() == [[float(i), pytest.approx(2.0)] for i in range(50)]
    noisy = [(float(i), float(i % 2)) for i in range(400)]
    assert smooth(noisy, share=0.05)[-1][1] == pytest.approx(0.5, abs=0.05)
    powers = [(float(i), 10.0 if i % 2 else 0.1) for i in range(400)] + [(400.0, 0.0)]
    assert smooth(powers, share=0.1, is_log=True)[-1].tolist() == [399.0, pytest.approx(1.0, abs=0.15)]


RECORD = {
    "step": 20, "loss": 1.5, "grad_norm": 0.25, "lr": 1e-3, "step_s": 0.12, "wait_s": 0.001, "compute_s": 0.119,
    "tokens_per_s": 8000.0, "tokens_per_s_per_device": 1000.0, "supervised": 64, "text_tokens": 384,
    "image_tokens": 128, "video_tokens": 0, "audio_tokens": 0, "padding": 0.125, "encoder_imbalance": 1.0342,
    "tflops_per_s": 155.0, "mfu": 0.412, "memory_bytes": 25 * 2**29, "skipped_steps": 1, "skipped_samples": 2,
    "eta_s": 61.0,
}  # fmt: skip


def test_progress_line_has_a_fixed_order() -> None:
    assert format_line(RECORD, 500) == (
        "step=20/500 loss=1.5000 grad_norm=0.250 lr=1.00e-03 step_time=120.0ms wait=1.0ms compute=119.0ms "
        "tokens/s=8000 tokens/s/device=1000 supervised=64 text=384 image=128 video=0 audio=0 padding=12.5% "
        "imbalance=1.03 mfu=41.2% memory=12.50GiB skipped_steps=1 skipped_samples=2 eta=1:01"
    )
    without_peak = {name: value for name, value in RECORD.items() if name != "mfu"}
    assert "imbalance=1.03 tflop/s=155 memory=" in format_line(without_peak, 500)
    terms = {"ce": 1.25, "ce_ahead_1": 2.5, "aux_loss": 1.0, "dropped": 3.0}
    line = format_line(RECORD | terms, 500, ("ce", "ce_ahead_1", "aux_loss"))
    assert "loss=1.5000 ce=1.2500 ce_ahead_1=2.5000 aux_loss=1.0000 grad_norm=0.250" in line
    assert "dropped" not in line
    assert format_duration(3700) == "1:01:40"


def test_lines_every_so_often_and_at_the_end() -> None:
    out = io.StringIO()
    with Progress(num_steps=5, log_every=2, stream=out) as progress:
        for step in range(1, 6):
            progress.show({**RECORD, "step": step})
        progress.say("done")
    steps = [line.split()[0] for line in out.getvalue().splitlines()]
    assert steps == ["step=2/5", "step=4/5", "step=5/5", "done"]


def test_bar_on_a_terminal_without_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.setenv("LINES", "0")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress(num_steps=1, log_every=1, stream=out) as progress:
        progress.show({**RECORD, "step": 1})
    assert "1/1" in out.getvalue()
    assert "loss=1.5000" in out.getvalue()
