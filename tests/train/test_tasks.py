"""Epochs in place of steps, and what is done behind some steps: evaluation, collecting garbage, a profile."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmfn import cli
from mmfn.train.build.forward import build_forward
from mmfn.train.build.run import prepare
from mmfn.train.config.load import load_config
from mmfn.train.run import loop
from mmfn.train.run.held_out import held_out_loss
from mmfn.train.run.loop import HELD_OUT as LOSS
from mmfn.train.run.modes import collected, deterministic
from mmfn.train.run.tasks import means_of
from tests.train.rank_cases import MakeConfig
from tests.train.test_loop import quiet

PLAIN = {"data.eval": None, "data.check": "first"}


def records_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_epochs_are_steps_that_take_every_sample_so_often(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    path = make_config(
        {**PLAIN, "train.steps": None, "train.epochs": 2, "data.batch_samples": 30, "checkpoint.every": 7}
    )
    run = prepare(load_config(path), said.append)
    assert run.loaded.config.train.steps == 7  # 2 * 96 samples by 30
    assert "train.epochs=2 of 96 samples: 7 steps" in said
    indices = [i for step in range(7) for i in run.loader.indices(step)]
    assert sorted(indices[:192]) == sorted([*range(96)] * 2)
    quiet(run)
    again = load_config(tmp_path / "run" / "config.yaml")
    assert again.config == run.loaded.config
    assert cli.main(["train", str(path), "output.overwrite=false"]) == 0
    assert "is finished: it has taken its 7 steps with these settings" in capsys.readouterr().out
    assert records_of(tmp_path / "run")[-1]["lr"] == pytest.approx(0.002 * 0.0495, rel=0.01)  # the last of 7 by cosine


def test_epochs_by_tokens(make_config: MakeConfig) -> None:
    changes = {"data.batch_tokens": 256, "data.token_buckets": [128], "train.steps": None, "train.epochs": 1}
    path = make_config({**PLAIN, **changes})
    run = prepare(load_config(path), lambda text: None)
    steps = run.loaded.config.train.num_steps
    shares = list(run.loader.steps(steps))
    assert len(shares) == steps
    assert sum(share.counts.samples for share in shares) >= 96 > sum(share.counts.samples for share in shares[:-1])


@pytest.mark.parametrize("both", [{"train.steps": None}, {"train.epochs": 2}])
def test_one_of_steps_and_epochs_is_set(make_config: MakeConfig, both: dict[str, int | None]) -> None:
    with pytest.raises(ValueError, match=r"train.steps and train.epochs: one of the two says how long the run is"):
        load_config(make_config(both))


def test_rules_of_steps_hold_for_those_of_epochs(make_config: MakeConfig) -> None:
    path = make_config({**PLAIN, "train.steps": None, "train.epochs": 1, "schedule.warmup_steps": 12})
    with pytest.raises(ValueError, match=r"schedule.warmup_steps 12 must be below train.steps 12; shorten it"):
        prepare(load_config(path), lambda text: None)


def test_held_out_loss_on_the_way(make_config: MakeConfig, tmp_path: Path) -> None:
    """That of the parameters behind the step; training is the same with it."""
    other = {"output.path": str(tmp_path / "other"), "data.check": "first"}
    changes = {"data.check": "first", "eval.every": 2, "eval.prompts": ["Which digit?", "And now?"]}
    quiet(prepare(load_config(make_config(changes)), lambda text: None))
    records = records_of(tmp_path / "run")
    keys = {LOSS, f"{LOSS}/eval.json/image"}
    assert [set(record) & keys for record in records] == [set(), keys, set(), keys]
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in answers] == [
        (step, prompt) for step in (2, 4) for prompt in changes["eval.prompts"]
    ]
    assert all(isinstance(row["answer"], str) for row in answers)
    final = json.loads((tmp_path / "run" / "eval.json").read_text())["loss"]
    assert records[3][LOSS] == pytest.approx(final, rel=1e-5)
    plain = prepare(load_config(make_config(other)), lambda text: None)
    others: list[dict[str, float]] = []
    params = loop.train(plain, others.append)["params"]
    assert [record["loss"] for record in others] == [record["loss"] for record in records]
    assert plain.held_out is not None
    forward = build_forward(plain.loaded.config, replace(plain.model, params=params), plain.place, plain.specs)
    assert means_of(held_out_loss(forward, plain.held_out, batch_samples=5))[LOSS] == pytest.approx(final, rel=1e-5)


def test_means_are_of_what_has_a_supervised_token() -> None:
    assert means_of({"a/image": (6.0, 2), "a/text": (2.0, 2), "b/text": (0.0, 0)}) == {
        LOSS: 2.0,
        f"{LOSS}/a/image": 3.0,
        f"{LOSS}/a/text": 1.0,
    }
    assert means_of({}) == {}


def test_garbage_is_collected_behind_every_so_many_steps(make_config: MakeConfig) -> None:
    """Cycles that each step leaves are there until then."""
    run = prepare(load_config(make_config({**PLAIN, "train.steps": 5})), lambda text: None)
    cycles: list[int] = []

    def emit(record: dict[str, float]) -> None:
        assert not gc.isenabled()
        cycles.append(gc.get_count()[0])

    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    with collected(2) as tasks:
        assert gc.get_freeze_count() > frozen
        assert [tasks[0].is_due(step) for step in (1, 2, 3, 4)] == [False, True, False, True]
        loop.train(run, emit, tasks=tasks)
    assert gc.isenabled() == enabled
    assert len(cycles) == 5
    assert cycles[1] < cycles[0]
    assert cycles[3] < cycles[2]


def test_a_window_of_steps_is_profiled(make_config: MakeConfig, tmp_path: Path) -> None:
    for window in ([1, 1], [2, 3]):
        changes = {**PLAIN, "train.profile": window, "output.path": str(tmp_path / str(window[0]))}
        quiet(prepare(load_config(make_config(changes)), lambda text: None))
        (trace,) = (tmp_path / str(window[0]) / "profile").iterdir()
        events = json.loads(trace.read_text())["traceEvents"]
        assert trace.name == "rank_0.json"
        assert sum(event["name"] == "aten::mm" for event in events) > 0


def test_an_operator_without_a_deterministic_form_is_refused() -> None:
    torch.use_deterministic_algorithms(False)
    try:
        with (
            pytest.raises(ValueError, match="deterministic: put_ has no form that gives the same bits each time"),
            deterministic(True),
        ):
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
        assert not torch.are_deterministic_algorithms_enabled()
        with deterministic(False):
            assert not torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RuntimeError, match="other"), deterministic(True):
            raise RuntimeError("other")
    finally:
        torch.use_deterministic_algorithms(True)
