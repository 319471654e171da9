"""TensorBoard and Weights & Biases: what they are given, what they leave, and that neither ends a run."""

import io
import json
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mmfn.train.build.run import prepare
from mmfn.train.config.load import load_config
from mmfn.train.run.progress import Progress
from mmfn.train.run.trackers import trackers
from mmfn.train.run.training import run_training

MakeConfig = Callable[..., Path]
SHORT = {"data.eval": None, "data.check": "first"}
BOARD, BIASES = "log.tensorboard=true", "log.wandb={project: demo}"


class Spy(ModuleType):
    """Both packages: what is called with what. `fails_at`: the step at which it does."""

    def __init__(self, fails_at: int | None = None, *, opens: bool = True) -> None:
        super().__init__("spy")
        self.calls: list[tuple[str, Any]] = []
        self.fails_at, self.opens = fails_at, opens
        self.__spec__ = type("Spec", (), {"origin": "spy"})()

    def SummaryWriter(self, folder: Path, purge_step: int | None) -> "Spy":
        return self._open("open", purge_step)

    def init(self, **options: Any) -> "Spy":
        return self._open("init", options)

    def _open(self, name: str, value: Any) -> "Spy":
        if not self.opens:
            raise OSError("no\nway in")
        self.calls.append((name, value))
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._take(step, name, value)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._take(step, "log", numbers)

    def _take(self, step: int, name: str, value: Any) -> None:
        if step == self.fails_at:
            raise RuntimeError("the connection is gone")
        self.calls.append((name, (step, value)))

    def finish(self) -> None:
        self.calls.append(("finish", None))

    close = finish


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Spy]:
    def put(**options: Any) -> Spy:
        spy = Spy(**options)
        for name in ("tensorboard", "torch.utils.tensorboard", "wandb"):
            monkeypatch.setitem(sys.modules, name, spy)
        return spy

    return put


def ran(config: Path, *overrides: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Records and lines of a run."""
    run, out = prepare(load_config(config, overrides), say=lambda text: None), io.StringIO()
    result = run_training(run, Progress(num_steps=4, log_every=1, stream=out))
    return list(result.tally.last), out.getvalue().splitlines()


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "step"}


def test_wandb_gets_every_record_and_the_config(make_config: MakeConfig, install: Any) -> None:
    spy = install()
    records, lines = ran(make_config(SHORT), BIASES)
    (_, options), *calls = spy.calls
    assert calls == [("log", (r["step"], numbers(r))) for r in records] + [("finish", None)]
    assert options["project"] == "demo"
    assert options["name"] == "run"
    assert options["config"]["train"]["steps"] == 4
    assert "mode" not in options, "where it goes its environment says"
    json.dumps(options)
    assert not any("warning" in line for line in lines)


def test_a_run_that_resumes_goes_on_in_the_same(make_config: MakeConfig, install: Any) -> None:
    spy = install()
    config = make_config({**SHORT, "checkpoint.every": 2, "checkpoint.resume": "auto"})
    ran(config, BIASES, BOARD)
    first = list(spy.calls)
    spy.calls.clear()
    ran(config, BIASES, BOARD, "train.steps=6")
    opened, again = (dict(calls[:2]) for calls in (first, spy.calls))
    assert opened["init"]["id"] == again["init"]["id"]
    assert again["init"]["resume"] == "allow"
    assert opened["open"] is None
    assert again["open"] == 5
    assert [value[0] for name, value in spy.calls if name == "log"] == [5, 6]


@pytest.mark.parametrize("step", [1, 3])
def test_one_that_fails_is_said_once_and_the_run_goes_on(make_config: MakeConfig, install: Any, step: int) -> None:
    spy = install(fails_at=step)
    records, lines = ran(make_config(SHORT), BIASES, BOARD)
    warnings = [line for line in lines if line.startswith("warning")]
    assert warnings == [
        f"warning: log.{name} has failed (RuntimeError: the connection is gone); the run goes on without it"
        for name in ("tensorboard", "wandb")
    ]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert not any(name == "finish" for name, _ in spy.calls)
    plain, _ = ran(make_config({**SHORT, "output.path": str(Path(make_config()).parent / "plain")}))
    assert [r["loss"] for r in plain] == [r["loss"] for r in records]


def test_one_that_cannot_be_opened(make_config: MakeConfig, install: Any, tmp_path: Path) -> None:
    install(opens=False)
    with pytest.raises(
        ValueError, match=r"^log.wandb cannot be opened \(OSError: no way in\); mend that or remove it$"
    ):
        ran(make_config(SHORT), BIASES)
    config, said = load_config(make_config(SHORT), [BIASES]).config, []
    with trackers(config, tmp_path, 3, said.append) as write:
        write({"step": 4, "loss": math.nan})
    assert said == ["warning: log.wandb cannot be opened (OSError: no way in); the run goes on without it"]


@pytest.mark.parametrize(("name", "override"), [("tensorboard", BOARD), ("wandb", BIASES)])
def test_a_package_that_is_not_there(make_config: MakeConfig, monkeypatch: Any, name: str, override: str) -> None:
    monkeypatch.setattr("mmfn.train.run.trackers.find_spec", lambda package: None)
    want = rf"^log.{name} needs the package {name}; install it with pip install mmfn\[{name}\], or remove it$"
    with pytest.raises(ValueError, match=want):
        prepare(load_config(make_config(SHORT), [override]), say=lambda text: None)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs the package tensorboard")
def test_event_files_hold_every_number(make_config: MakeConfig, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config({**SHORT, "checkpoint.every": 2, "checkpoint.resume": "auto"})
    ran(config, BOARD)
    records, _ = ran(config, BOARD, "train.steps=6")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(numbers(records[0]))
    for name in events.Tags()["scalars"]:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records]


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs the package wandb")
def test_wandb_offline_leaves_a_run_in_the_folder(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _, lines = ran(make_config(SHORT), BIASES)
    assert not any("warning" in line for line in lines)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
