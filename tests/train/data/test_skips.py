"""Samples that are left out: the ledger, the share that is allowed, and steps of which nothing is left."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfn.batch import Sample
from mmfn.train.data import Workers
from mmfn.train.data.bad import BadSample
from mmfn.train.data.skips import Ledger, Skip, check_share, count_kinds
from tests.train.data.order_cases import MODES, Data, make_loader, run


def skip(place: int, kind: str = "bad") -> Skip:
    return Skip(place=place, id=f"s{place}", row=f"'a.jsonl', line {place}", kind=kind, reason="it broke; mend it")


def test_a_ledger_has_a_line_for_each_skip_and_none_twice(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    whole = Ledger(path)
    assert not path.exists()
    whole.write(1, [])
    assert not path.exists()
    steps = {2: [skip(3), skip(5, "too_long")], 4: [skip(9)], 7: [skip(11)]}
    for step, skips in steps.items():
        whole.write(step, skips)
    text = path.read_text()
    assert json.loads(text.splitlines()[1]) == {
        "step": 2,
        "place": 5,
        "id": "s5",
        "row": "'a.jsonl', line 5",
        "kind": "too_long",
        "reason": "it broke; mend it",
    }
    for done in range(8):  # a run that was killed behind step 7 goes on from a checkpoint of an earlier one
        again = Ledger(path, done)
        for step, skips in steps.items():
            if step > done:
                again.write(step, skips)
        assert path.read_text() == text
    path.write_text(text[:-9])  # a kill has cut the last line short
    again = Ledger(path, 6)
    again.write(7, steps[7])
    assert path.read_text() == text
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["half \ud800 a character", "line\u2028end\x85s", "tab\t\r\nline"])
def test_a_ledger_takes_any_id(tmp_path: Path, name: str) -> None:
    path = tmp_path / "skipped.jsonl"
    Ledger(path).write(1, [replace(skip(3), id=name, reason=f"{name} is wrong"), skip(4)])
    text = path.read_text(encoding="utf-8")
    assert [json.loads(line)["id"] for line in text.splitlines()] == [name, "s4"]
    Ledger(path, 1)
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("num_bad", "num_seen", "size", "most", "is_fine"),
    [
        (0, 8, 10**6, 0.0, True),
        (1, 10**6, 10**6, 0.0, False),
        (10, 16, 10**6, 0.01, True),  # of a thousand at least
        (11, 16, 10**6, 0.01, False),
        (11, 1100, 10**6, 0.01, True),
        (1, 8, 96, 0.01, False),  # a small set
        (3, 8, 96, 0.04, True),
        (95, 96, 96, 1.0, True),
    ],
)
def test_the_share_that_is_allowed(num_bad: int, num_seen: int, size: int, most: float, is_fine: bool) -> None:
    skips = [skip(i) for i in range(5)]
    if is_fine:
        check_share(skips, num_bad, num_seen, size, most)
        return
    with pytest.raises(
        ValueError, match=f"{num_bad} of {num_seen} samples cannot be used, more than data.max_bad"
    ) as e:
        check_share(skips, num_bad, num_seen, size, most)
    assert str(e.value).count("it broke") == 3
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("num", [96, 200])
def test_a_run_needs_samples(num: int) -> None:
    with pytest.raises(
        ValueError, match="none of the 96 samples can be used, and there is nothing to train on: sample"
    ):
        check_share([skip(0)], num, num, 96, 1.0)
    check_share([skip(0)], 95, 95, 96, 1.0)  # the last may be good


def test_kinds_are_counted_even_where_there_are_none() -> None:
    assert count_kinds([skip(1), skip(2, "too_long"), skip(3)]) == {"bad": 2, "too_long": 1}
    assert count_kinds([]) == {"bad": 0, "too_long": 0}


class Broken(Data):
    """Some entries break once their media are read."""

    def __init__(self, breaks: Any) -> None:
        super().__init__(24)
        self.breaks = breaks

    def measure(self, index: int) -> Sample:
        return self._sample(index, 20)

    def sample(self, index: int) -> Sample:
        if self.breaks(index):
            raise BadSample(f"s{index}", self.place(index), "its image ends early; restore it")
        return self.measure(index)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_of_which_nothing_is_left(mode: str, ranks: int) -> None:
    """Every rank has a micro-batch without samples, and goes on."""
    steps, state = run(mode, 5, ranks=ranks, dataset=Broken(lambda index: True))
    assert [step["counts"] for step in steps] == [[0, 0, 0, 0]] * 5
    assert all(step["skips"] for step in steps)
    assert state["bad"] == state["seen"] == sum(len(step["skips"]) for step in steps)


def test_a_rank_of_which_nothing_is_left() -> None:
    order = Data(24).order(3)
    first = order.rows(torch.arange(0, 6, 2)).tolist()  # those of rank 0
    steps, _ = run("samples", 1, ranks=2, dataset=Broken(lambda index: index in first))
    assert steps[0]["counts"][0] == len(steps[0]["skips"]) == 3


def test_a_sample_of_other_sizes_than_measured_is_left_out() -> None:
    """Its place was planned for what the headers said."""

    class Lying(Broken):
        def sample(self, index: int) -> Sample:
            return self._sample(index, 64 if index == 3 else 20)

    steps, _ = run("tokens", 6, dataset=Lying(None))
    lies = [skip for step in steps for skip in step["skips"]]
    assert lies
    assert all("'s3'" in skip and "have other sizes than their headers say" in skip for skip in lies)


def test_data_of_which_nothing_can_be_used_is_refused() -> None:
    class Missing(Data):
        def measure(self, index: int) -> Sample:
            raise BadSample(f"s{index}", self.place(index), "its image is missing; restore it")

    with pytest.raises(ValueError, match="none of the first 97 samples can be used; "):
        make_loader("tokens", dataset=Missing())


def test_cut_samples_end_with_an_answer_and_are_counted() -> None:
    for policy, kinds in (("cut", 0), ("skip", 1)):
        loader = make_loader("samples", long_samples=policy)
        found, skips, cut = loader.reader.read(list(range(97)))
        long = {s.id for s in skips if s.kind == "too_long"}
        assert (cut > 0) == (policy == "cut")
        assert all(s.tokens_T.numel() <= 64 for s in found)
        assert len(found) + len(skips) == 97
        assert all(not int(name[1:]) % 2 for name in long) == (kinds == 0)
    with pytest.raises(
        ValueError, match=r"sample 's\d+' of 'made.jsonl', line \d+ has \d+ tokens but the largest bucket"
    ):
        make_loader("samples", long_samples="stop").reader.read(list(range(97)))


def test_a_step_stops_the_run_when_too_much_is_bad() -> None:
    loader = make_loader("samples", max_bad_share=0.05, workers=Workers(number=1))
    bad = [agreed.cursor.bad for agreed in loader.steps(5)]

    def go_on() -> None:
        for agreed in loader.steps(5):
            loader.check_share(agreed)

    assert bad[-1] > 0.05 * 97
    with pytest.raises(
        ValueError, match=r"samples cannot be used, more than data.max_bad_share 0.05 allows: sample 's"
    ):
        go_on()
