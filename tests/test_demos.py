"""The demos of video and text: what they write, and, slowly, that a model learns it through the command line."""

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.datasets import load_breast_cancer, load_digits

from mmfn import cli, rng
from mmfn.models.data import Sampling
from mmfn.train.data import Dataset, load_processor
from mmfn.train.data.video import decode_video
from tests.oracles.demo_answers import library_answers

ROOT = Path(__file__).parents[1]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`load("cells")`: that example as a module."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


def entries_of(folder: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_moving_digits(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of the digits of either split, without loss, twice the same bytes; samples hold all of their frames."""
    module = load("moving_digits")
    monkeypatch.setattr(module, "NUM_CLIPS", 40)
    for name in ("a", "b"):
        module.write_demo(tmp_path / name)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    train, held_out = (entries_of(tmp_path / "a", name) for name in ("train", "eval"))
    assert (len(train), len(held_out)) == (40, 360)
    ways = Counter(entry["messages"][1]["content"] for entry in held_out)
    assert ways.keys() == set(module.DIRECTIONS)
    assert min(ways.values()) > 60
    digits = (load_digits().images * (255 / 16)).astype(np.uint8)
    order = rng.permutation(len(digits), 0, "digits")
    everything = Sampling(fps=2.0, select=lambda num, rate: list(range(num)), size=lambda *shape: shape[1:])
    for split, known in ((train, order[:1437]), (held_out, order[1437:])):
        patterns = {digits[i].tobytes() for i in known}
        for entry in split[:20]:
            footage = decode_video(tmp_path / "a" / entry["videos"][0], everything)
            frames = footage.frames_u8
            assert (footage.times, footage.rate) == ([i / 2 for i in range(8)], 2.0)
            assert torch.equal(frames[:, 0], frames[:, 1])
            rows, columns = module.DIRECTIONS[entry["messages"][1]["content"]]
            moved = [np.roll(frames[0, 0].numpy(), (t * rows, t * columns), (0, 1)) for t in range(8)]
            assert np.array_equal(np.stack(moved), frames[:, 0].numpy())
            first = frames[0, 0].numpy()
            shifts = [np.roll(first, (-y, -x), (0, 1))[:8, :8].tobytes() for y in range(16) for x in range(16)]
            assert patterns & set(shifts)
    sample = Dataset(tmp_path / "a" / "train.json", load_processor(tmp_path / "a" / "model")).sample(0)
    assert sample.videos[0].grid == (4, 4, 4)


def test_no_single_frame_tells_the_direction(load: Any) -> None:
    """The frames of all four directions from a place are those of any other from another place."""
    module = load("moving_digits")
    digit = load_digits().images[0].astype(np.uint8)
    steps = range(0, module.CANVAS, module.STEP)
    seen = [
        {frame.tobytes() for y in steps for x in steps for frame in module.clip(digit, direction, (y, x))}
        for direction in module.DIRECTIONS
    ]
    assert all(frames == seen[0] for frames in seen)


def test_cells(load: Any, tmp_path: Path) -> None:
    """The records and their truth; tenths of the training records alone say what the digits mean."""
    module = load("cells")
    for name in ("a", "b"):
        module.write_demo(tmp_path / name)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    train, held_out = (entries_of(tmp_path / "a", name) for name in ("train", "eval"))
    assert (len(train), len(held_out)) == (455, 114)
    data = load_breast_cancer()
    numbers = {entry["id"]: int(entry["id"].removeprefix("record-")) for entry in train + held_out}
    assert sorted(numbers.values()) == list(range(569))
    known = data.data[[numbers[entry["id"]] for entry in train]]
    for entry in held_out[::20] + train[::90]:
        index = numbers[entry["id"]]
        assert entry["messages"][1]["content"] == data.target_names[data.target[index]]
        shares = (known < data.data[index]).mean(0)  # of the training records that lie below
        digits = [int(word) for word in entry["messages"][0]["content"].removesuffix(module.END).split()[-30:]]
        assert np.abs(np.array(digits) + 0.5 - 10 * shares).max() < 0.75


@pytest.mark.slow
@pytest.mark.parametrize(("name", "module", "least"), [("video", "moving_digits", 0.97), ("text", "cells", 0.93)])
def test_a_model_learns_it(name: str, module: str, least: float, load: Any, tmp_path: Path, capsys: Any) -> None:
    """Trained and evaluated by the commands, as `make demo-NAME` does; transformers answers the same, of its own."""
    load(module).write_demo(tmp_path)
    text = (ROOT / "configs" / f"demo-{name}.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text.replace(f"build/demo-{name}", str(tmp_path)))
    config["train"]["allocator"] = "default"  # the other is for the whole process
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert cli.main(["train", str(tmp_path / "config.yaml")]) == 0
    evaluation = json.loads((tmp_path / "run" / "eval.json").read_text(encoding="utf-8"))
    accuracy = evaluation["accuracy"]
    assert accuracy >= least
    answers = [answer["prediction"] for answer in evaluation["answers"]]
    assert answers == list(library_answers(tmp_path, config["eval"]["max_new_tokens"]))
    assert len(set(answers)) == (4 if name == "video" else 2)
    capsys.readouterr()
    loaded = ["model.init=load", f"model.path={tmp_path / 'run' / 'checkpoint'}"]
    assert cli.main(["eval", str(tmp_path / "config.yaml"), *loaded]) == 0
    assert f"held-out accuracy: {accuracy:.4f}" in capsys.readouterr().out
