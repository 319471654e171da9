"""Settings of the whole suite, and the demo's data in a small form for the tests of runs."""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched: a test that needs the network is wrong
torch.use_deterministic_algorithms(True)

ROOT = Path(__file__).parents[1]
NUM_TRAIN, NUM_HELD_OUT = 96, 24


def pytest_configure(config: pytest.Config) -> None:
    """Where torch_npu is installed without CANN, transformers, by which much is tested, fails to import it.

    It is as if not installed then, but to its own tests (`-m npu`), which bring what it needs of CANN.
    """
    if config.getoption("markexpr") == "npu" or importlib.util.find_spec("torch_npu") is None:
        return
    try:
        importlib.import_module("torch_npu")
    except ImportError:
        sys.modules["torch_npu"] = None  # type: ignore[assignment]  # how Python writes down what is not to be found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run where there is one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def scheduling() -> Iterator[None]:
    """A test leaves this process scheduled as it was: what comes after it, and the processes of these, inherit it.

    Ranks that run in real time starve each other where there are fewer cores.
    """
    if sys.platform != "linux":
        yield
        return
    before = os.sched_getscheduler(0), os.nice(0)
    yield
    assert (os.sched_getscheduler(0), os.nice(0)) == before


@pytest.fixture(scope="session")
def full_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that examples/digits.py writes. Do not change it."""
    spec = importlib.util.spec_from_file_location("digits_of_runs", ROOT / "examples" / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path_factory.mktemp("demo")
    module.write_demo(out)
    return out


@pytest.fixture(scope="session")
def small_demo(full_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 96 training and 24 held-out entries. Do not change it."""
    out = tmp_path_factory.mktemp("small")
    (out / "images").symlink_to(full_demo / "images")
    (out / "model").symlink_to(full_demo / "model")
    for name, count in (("train.json", NUM_TRAIN), ("eval.json", NUM_HELD_OUT)):
        entries = json.loads((full_demo / name).read_text(encoding="utf-8"))[:count]
        for entry in entries:
            entry["images"] = [str(path) for path in entry["images"]]
        (out / name).write_text(json.dumps(entries), encoding="utf-8")
    return out


@pytest.fixture
def make_config(small_demo: Path, full_demo: Path, tmp_path: Path) -> Callable[..., Path]:
    """`make_config({"train.steps": 3})` writes a config of a short run into tmp_path/run and returns its path."""

    def make(changes: dict[str, Any] | None = None) -> Path:
        settings = {
            "model.path": str(small_demo / "model"),
            "model.init": "random",
            "data.train": str(small_demo / "train.json"),
            "data.eval": str(small_demo / "eval.json"),
            "data.root": str(full_demo),
            "data.batch_samples": 8,
            "data.token_buckets": [384],
            "data.tower_buckets": {"vision": [128]},
            "optimizer.lr": 2e-3,
            "train.steps": 4,
            "train.log_every": 2,
            "eval.max_new_tokens": 3,
            "output.path": str(tmp_path / "run"),
        } | (changes or {})
        if settings["data.eval"] is None:
            settings = {key: value for key, value in settings.items() if not key.startswith("eval.")}
        sections: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            section, name = key.split(".")
            sections.setdefault(section, {})[name] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(sections), encoding="utf-8")
        return path

    return make
