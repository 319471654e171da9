"""`mmfn data check`: counts equal those of all rows at once, in any order of work; pages are whole and escaped."""

import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from mmfn import cli
from mmfn.batch import IGNORE, TEXT, Sample
from mmfn.train.data import Dataset, load_processor
from mmfn.train.data.bad import BadSample
from mmfn.train.report.chart import bar_chart
from mmfn.train.survey.counts import Counts, Row, histogram, percentile, total
from mmfn.train.survey.excerpt import Span, on_terminal, spans
from mmfn.train.survey.fill import Fill, Fills, Size, suggest
from mmfn.train.survey.page import Excerpt, render_page
from mmfn.train.survey.survey import Survey
from mmfn.train.survey.text import on_terminal as survey_text
from mmfn.train.survey.text import settings, tower_sizes


class Letters:
    """A tokenizer whose tokens are code points."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "".join(map(chr, ids))


def sample(text: str, trained: Sequence[int] = (), kinds: Sequence[int] | None = None) -> Sample:
    tokens_T = torch.tensor([ord(c) for c in text], dtype=torch.int64)
    is_trained_T = torch.zeros(len(text), dtype=torch.bool)
    is_trained_T[list(trained)] = True
    return Sample(
        tokens_T=tokens_T,
        labels_T=torch.where(is_trained_T, tokens_T, IGNORE),
        kinds_T=torch.tensor(kinds or [TEXT] * len(text), dtype=torch.int64),
    )


def test_spans_are_the_whole_text_and_say_what_is_learned() -> None:
    parts = list(spans(sample("ab###cde", trained=(6, 7), kinds=[0, 0, 1, 1, 1, 0, 0, 0]), Letters()))
    assert parts == [
        Span(text="ab", is_trained=False),
        Span(text="#", is_trained=False, num=3),
        Span(text="c", is_trained=False),
        Span(text="de", is_trained=True),
    ]
    assert on_terminal(parts, is_coloured=False) == "ab[# x 3]c⟦de⟧"
    assert on_terminal(parts, is_coloured=True).count("\033[0m") == 2


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_and_histograms_are_those_of_the_values(seed: int) -> None:
    draw = random.Random(seed)
    values = sorted(draw.choice((draw.randrange(4), draw.randrange(3000))) for _ in range(draw.randrange(1, 400)))
    counter = Counter(values)
    assert total(counter) == sum(values)
    for share in (0.01, 0.5, 0.95, 1.0):
        assert percentile(counter, share) == values[math.ceil(share * len(values)) - 1]
    ranges = histogram(counter)
    assert [n for _, _, n in ranges] == [sum(low <= v < high for v in values) for low, high, _ in ranges]
    assert sum(n for _, _, n in ranges) == len(values)


def test_counts_add_rows_and_group_reasons_of_a_kind() -> None:
    counts = Counts()
    counts.add(Row(tokens=10, trained=4, units={"vision": 6}, media={"image": [2, 4]}))
    counts.add(Row(tokens=3, trained=1, units={"vision": 0}, media={}))
    for i in range(5):
        counts.skip(BadSample(str(i), "here", f"image 'a{i}.png' has {i} pixels"))
    counts.skip(BadSample("x", "here", "the answer is empty"))
    assert (counts.rows, counts.samples, counts.skipped, counts.text_only, counts.trained) == (8, 2, 6, 1, 5)
    assert counts.media == {"image": Counter({2: 1, 4: 1})}
    assert sorted(reason.count for reason in counts.reasons.values()) == [1, 5]
    assert max(len(reason.examples) for reason in counts.reasons.values()) == 3


def first_fit(sizes: Sequence[Size], budget: int) -> list[list[int]]:
    groups: list[list[int]] = []
    for i, size in enumerate(sizes):
        room = (g for g in groups if sum(sizes[k]["tokens"] for k in g) + size["tokens"] <= budget)
        group = next(room, None)
        if group is None:
            groups.append(group := [])
        group.append(i)
    return groups


def test_fills_pack_window_by_window_and_the_smallest_good_budget_is_suggested() -> None:
    fills = Fills(first_fit, (100, 200, 400), window=10, windows=2)
    for _ in range(25):
        fills.add({"tokens": 100, "vision": 3})
    fills.add({"tokens": 150, "vision": 3})  # behind the last window
    fills.flush()
    assert [(f.batches, f.share, f.too_long) for f in fills.fills] == [(20, 1.0, 0), (10, 1.0, 0), (6, 5 / 6, 0)]
    assert [f.units["vision"] for f in fills.fills] == [3, 6, 12]
    choice = suggest(fills.fills)
    assert choice is not None
    assert choice.budget == 100
    long = Fills(first_fit, (100, 200))
    for tokens in [150] * 5:
        long.add({"tokens": tokens})
    long.flush()
    choice = suggest(long.fills)
    assert choice is not None
    assert (choice.budget, choice.share) == (200, 0.75)  # badly filled, and yet the only one that they fit
    assert suggest(Fills(first_fit).fills) is None
    few = Fills(first_fit)
    for tokens in (100, 250):
        few.add({"tokens": tokens, "vision": 3})
    few.flush()
    choice = suggest(few.fills)
    assert choice is not None
    assert (choice.budget, choice.batches, choice.samples, choice.share) == (512, 1, 2, 350 / 512)
    assert choice.units == {"vision": 6}


def example() -> Survey:
    counts, fills = Counts(), Fills(first_fit, (32,))
    for tokens in (10, 20, 30):
        row = Row(tokens=tokens, trained=5, units={"vision": 4}, media={"image": [4]})
        counts.add(row)
        fills.add({"tokens": tokens, **row.units})
    counts.skip(BadSample("7", "'a.json', entry 7", "image '<b>.png' is broken"))
    fills.flush()
    return Survey(counts=counts, fills=fills.fills, inputs={"vision": 4})


def test_a_tower_has_room_for_what_batches_have_and_little_more() -> None:
    """Of text alone one unit stays, as a bucket must hold something; large ones are rounded to 256."""
    nums = {0: 1, 1: 1, 8: 8, 42: 44, 168: 176, 2047: 2048, 5000: 5120, 100_001: 100_096}
    for num, units in nums.items():
        fill = Fill(budget=2048, units={"vision": num})
        assert tower_sizes(fill, {"vision": 4}) == {"vision": 4 * units}


def test_a_survey_in_words() -> None:
    text = survey_text(example())
    assert "4, of these 1 are skipped" in text
    assert "60, of these 15 are learned (25.0%)" in text
    assert "image '<b>.png' is broken" in text
    assert settings(example()).startswith("data:\n  token_buckets: [32]\n  tower_buckets: {vision: [32]}\n")
    assert settings(Survey()) == ""
    assert survey_text(Survey())


def test_a_page_is_escaped_and_needs_nothing_else() -> None:
    page = render_page(
        example(),
        [Excerpt(id="<i>", spans=[Span(text="<script>", is_trained=True)], images=["data:image/png;base64,AA=="])],
        title="<data>",
        subtitle="sub",
    )
    for hidden in ("<script>", "<data>", "<b>.png", "<i>"):
        assert hidden not in page
    assert page.count("<rect") >= 2
    assert "http" not in page.replace("http://www.w3.org", "")


def test_bars_are_as_high_as_their_counts() -> None:
    svg = ElementTree.fromstring(bar_chart([("a", 10), ("b<", 5), ("c", 0)], label="x"))
    heights = [float(rect.attrib["height"]) for rect in svg.iter("rect")]
    assert heights[0] == pytest.approx(2 * heights[1], rel=0.01)
    assert heights[2] == 0
    assert statistics.fmean(heights) > 0


def mixed_set(small_demo: Path, folder: Path) -> tuple[Path, int]:
    """The demo's entries with a conversation without media and four that cannot be used among them."""
    entries = json.loads((small_demo / "train.json").read_text(encoding="utf-8"))
    talk = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "yo"}]
    picture = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]
    bad = [
        {"messages": picture, "images": ["images/none.png"]},
        {"messages": picture, "images": ["images/nil.png"]},
        {"messages": talk, "imagez": []},
        {"messages": talk[:1]},
    ]
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [{"id": "talk", "messages": talk}, *bad, *entries]))
    return path, len(entries)


def check(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(["data", "check", *argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("workers", ["0", "3"])
def test_a_data_set_is_checked_row_by_row(
    small_demo: Path, full_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    path, num = mixed_set(small_demo, tmp_path)
    page = tmp_path / "page.html"
    options = ["--model", str(small_demo / "model"), "--samples", "2", "--html", str(page)]
    settings = [f"data.root={full_demo}", "data.token_buckets=[64, 512]", f"data.workers={workers}"]
    code, out, err = check(capsys, str(path), *options, *settings)
    assert (code, err) == (0, "")
    data = Dataset(small_demo / "train.json", load_processor(small_demo / "model"), media_root=full_demo)
    samples = [data.sample(i) for i in range(num)]
    tokens = sum(s.tokens_T.numel() for s in samples)
    learned = sum(int((s.labels_T != IGNORE).sum()) for s in samples)
    talk = Dataset(path, load_processor(small_demo / "model")).sample(0)
    tokens, learned = tokens + talk.tokens_T.numel(), learned + int((talk.labels_T != IGNORE).sum())
    assert f"rows                   {num + 5}, of these 4 are skipped" in out
    assert f"{tokens:,}, of these {learned:,} are learned" in out
    assert f"images                 {num}: mean 4" in out
    for piece in ("line 2", "line 3", "line 4", "'imagez'", "none.png", "sample talk", "⟦yo<|im_end|>"):
        assert piece in out
    assert "2 skipped, as:" in out
    html = page.read_text(encoding="utf-8")
    for piece in ("Hi &lt;b&gt;", "data:image/png;base64,", "none.png", "token_buckets"):
        assert piece in html
    assert 'class="learned">yo&lt;|im_end|&gt;' in html


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--samples", "-1"], "--samples must not be negative, got -1"),
        (["--html", "/no/such/folder/x.html"], "--html '/no/such/folder/x.html' lies in a folder that does not exist"),
        (["--html", "/tmp"], "--html '/tmp' is a folder; give the path of a file"),
        (["data.train=x.json"], "data.train has no effect here, where FILE is what is checked; remove it"),
        (["train.steps=3"], "train.steps has no effect here, where settings of data alone count; remove it"),
        (["data.workers=-1"], "data.workers is -1 but input should be greater than or equal to 0"),
        (["data.root=[1]"], "data.root is [1] but input should be a valid string"),
        (["data.tags={user_tag: x}"], "tags need a format"),
    ],
)
def test_wrong_options_are_one_sentence(
    small_demo: Path, capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    file = str(small_demo / "train.json")
    code, out, err = check(capsys, file, "--model", str(small_demo / "model"), *argv)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.strip().splitlines()) == 1


def test_a_page_replaces_neither_data_nor_model(small_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, model = str(small_demo / "train.json"), str(small_demo / "model")
    for path in (file, f"{model}/config.json", f"{model}/tokenizer.json"):
        before = Path(path).read_bytes()
        code, _, err = check(capsys, file, "--model", model, "--html", path)
        assert code == 2
        assert f"--html {path!r} is there and was not written by this command; choose another file" in err
        assert Path(path).read_bytes() == before


def test_colours_are_those_that_are_asked_for(full_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, model = str(full_demo / "train.json"), str(full_demo / "model")
    _, plain, _ = check(capsys, file, "--model", model, "data.max_samples=3")
    _, coloured, _ = check(capsys, file, "--model", model, "data.max_samples=3", "--colour", "always")
    assert "\033[32m" in coloured
    assert "\033" not in plain
    assert "rows                   3," in plain
