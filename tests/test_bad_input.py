"""Whatever a user gets wrong ends in one clear sentence, exit code 2, and nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mmfn
from mmfn import cli

Change = Callable[[Path], None]
WEIGHTS = "model.safetensors"
NORM = "model.language_model.norm.weight"
PATCHES = "model.visual.patch_embed.proj.weight"


@pytest.fixture(scope="module")
def checkpoint(full_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with weights. Do not change it."""
    model = mmfn.init(json.loads((full_demo / "model" / "config.json").read_text()))
    folder = tmp_path_factory.mktemp("stored") / "model"
    mmfn.save_hf(folder, model, assets=full_demo / "model")
    return folder


@pytest.fixture
def complaint(
    make_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run `mmfn train` with changed settings; it must fail as it should. Returns the sentence."""

    def run(changes: dict[str, Any], *overrides: str) -> str:
        config = make_config(changes)
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(["train", str(config), *overrides]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("mmfn: error: ")
        assert captured.err.count("\n") == 1
        assert "Traceback" not in captured.err
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return captured.err.removeprefix("mmfn: error: ")

    return run


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN_MODELS: dict[str, tuple[Change, list[str]]] = {
    "no weights": (lambda m: (m / WEIGHTS).unlink(), [WEIGHTS]),
    "truncated weights": (lambda m: truncate(m / WEIGHTS), [WEIGHTS]),
    "text for weights": (lambda m: (m / WEIGHTS).write_text("no"), [WEIGHTS]),
    "wrong shape": (
        lambda m: edit_weights(m / WEIGHTS, lambda t: t.update({NORM: torch.ones(7)})),
        [NORM, "7", "96"],
    ),
    "missing tensor": (lambda m: edit_weights(m / WEIGHTS, lambda t: t.pop(NORM)), [NORM]),
    "unexpected tensor": (
        lambda m: edit_weights(m / WEIGHTS, lambda t: t.update({NORM + "s": torch.ones(96)})),
        [NORM + "s", NORM],
    ),
    "integer tensor": (
        lambda m: edit_weights(m / WEIGHTS, lambda t: t.update({NORM: torch.ones(96, dtype=torch.int64)})),
        [NORM, "int"],
    ),
    "no config": (lambda m: (m / "config.json").unlink(), ["config.json"]),
    "broken config": (lambda m: (m / "config.json").write_text("{"), ["config.json", "JSON"]),
    "unknown family": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(model_type="qwen3_vk")),
        ["'qwen3_vk'", "'qwen3_vl'"],
    ),
    "NaN as a setting": (
        lambda m: edit_json(m / "config.json", lambda c: c["text_config"].update(rms_norm_eps=float("inf"))),
        ["rms_norm_eps is inf"],
    ),
    "tokens of another model": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(image_token_id=5)),
        ["image_token_id is 5 in config.json", "'<|image_pad|>'"],
    ),
    "four channels": (
        lambda m: (
            edit_json(m / "config.json", lambda c: c["vision_config"].update(in_channels=4)),
            edit_weights(m / WEIGHTS, lambda t: t.update({PATCHES: torch.zeros(64, 4, 2, 4, 4)})),
        ),
        ["in_channels is 4"],
    ),
    "end of an answer that is no token": (
        lambda m: (m / "generation_config.json").write_text('{"eos_token_id": ["x"]}'),
        ["eos_token_id is ['x']", "generation_config.json"],
    ),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), ["tokenizer"]),
    "no image settings": (lambda m: (m / "preprocessor_config.json").unlink(), ["preprocessor_config.json"]),
    "other patches": (
        lambda m: edit_json(m / "preprocessor_config.json", lambda c: c.update(patch_size=8)),
        ["patch_size"],
    ),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_model(name: str, checkpoint: Path, tmp_path: Path, complaint: Callable[..., str]) -> None:
    change, expected = BROKEN_MODELS[name]
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    change(model)
    sentence = complaint({"model.path": str(model), "model.init": "load"})
    for text in expected:
        assert text in sentence


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "7"}]


GOOD = {"id": "good", "messages": user("<image>Which?"), "images": ["good.png"]}
BROKEN_DATA: dict[str, tuple[Any, list[str]]] = {
    "image that does not decode": ({**GOOD, "id": "bad", "images": ["broken.png"]}, ["'bad'", "broken.png"]),
    "truncated image": ({**GOOD, "id": "bad", "images": ["half.png"]}, ["'bad'", "half.png"]),
    "missing image": ({**GOOD, "id": "bad", "images": ["none.png"]}, ["'bad'", "none.png"]),
    "more placeholders than images": (
        {"id": "bad", "messages": user("<image><image>?"), "images": ["good.png"]},
        ["'bad'", "2 image placeholders for 1 image"],
    ),
    "fewer placeholders than images": (
        {"id": "bad", "messages": user("?"), "images": ["good.png"]},
        ["'bad'", "0 image placeholders for 1 image"],
    ),
    "path outside the folder": ({**GOOD, "id": "bad", "images": ["../good.png"]}, ["entry 1", "'../good.png'"]),
    "unknown role": ({"id": "bad", "messages": [{"role": "human", "content": "?"}]}, ["entry 1", "'human'"]),
    "nothing to learn": ({"id": "bad", "messages": user("?")[:1]}, ["'bad'", "; give it "]),
    "no messages": ({"id": "bad", "text": "?"}, ["entry 1", "'messages'"]),
    "no object": (7, ["entry 1", "int"]),
}


@pytest.mark.parametrize("name", BROKEN_DATA)
@pytest.mark.parametrize("which", ["train", "eval"])
def test_broken_data(name: str, which: str, tmp_path: Path, complaint: Callable[..., str]) -> None:
    entry, expected = BROKEN_DATA[name]
    data = tmp_path / "data"
    data.mkdir()
    Image.effect_noise((64, 64), 50).save(data / "good.png")
    (data / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    shutil.copy(data / "good.png", data / "half.png")
    truncate(data / "half.png")
    (data / "set.json").write_text(json.dumps([GOOD, entry]))
    (data / "good.json").write_text(json.dumps([GOOD]))
    paths = {"data.train": str(data / "good.json"), "data.eval": str(data / "good.json"), "data.root": None}
    sentence = complaint({**paths, f"data.{which}": str(data / "set.json")})
    for text in expected:
        assert text in sentence


def test_sample_longer_than_the_largest_bucket(tmp_path: Path, complaint: Callable[..., str]) -> None:
    (tmp_path / "set.json").write_text(json.dumps([{"id": "long", "messages": user("long " * 200)}]))
    sentence = complaint({"data.train": str(tmp_path / "set.json")})
    assert "'long'" in sentence
    assert "the largest bucket holds 384" in sentence
    sentence = complaint({"data.train": str(tmp_path / "set.json"), "data.max_tokens": 100})
    assert "max_tokens is 100" in sentence


@pytest.mark.parametrize(("content", "expected"), [("[", "not valid JSON"), ("[]", "is empty"), ("", "is empty")])
def test_broken_data_file(content: str, expected: str, tmp_path: Path, complaint: Callable[..., str]) -> None:
    (tmp_path / "set.json").write_text(content)
    sentence = complaint({"data.train": str(tmp_path / "set.json")})
    assert "set.json" in sentence
    assert expected in sentence


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data.train": "nowhere/train.json"}, ["'nowhere/train.json'"]),
        ({"model.path": "nowhere"}, ["model.path 'nowhere' is no folder"]),
        ({"model.device": "gpu"}, ["model.device 'gpu' cannot be used"]),
        ({"model.device": "meta"}, ["model.device 'meta' cannot be used"]),
        ({"optimizer.no_decay": ["("], "optimizer.weight_decay": 0.1}, ["pattern '(' is no regular expression"]),
        ({"output.path": "a" * 300}, ["output.path 'aaa", "File name too long"]),
        ({"objective.name": "per_token"}, ["'per_token'", "'per_token_loss'"]),
        ({"optimizer.no_decay": [".*nrom.*"], "optimizer.weight_decay": 0.1}, ["'.*nrom.*' matches none"]),
        ({"data.tower_buckets": {"vision": [126]}}, ["must be multiples of 4, what makes a feature, got 126"]),
        ({"data.template": "nowhere.jinja"}, ["data.template 'nowhere.jinja' cannot be read"]),
        ({"data.template": "/dev/null"}, ["data.template '/dev/null' is empty; give a template"]),
        ({"data.root": "nowhere"}, ["data.root 'nowhere' is no folder"]),
        ({"optimizer.lrate": 1.0}, [":", "'optimizer.lrate'", "'optimizer.lr'"]),
    ],
    ids=str,
)
def test_wrong_setting(changes: dict[str, Any], expected: list[str], complaint: Callable[..., str]) -> None:
    sentence = complaint(changes)
    for text in expected:
        assert text in sentence


def test_unknown_override_names_the_nearest(complaint: Callable[..., str]) -> None:
    assert (
        complaint({}, "train.step=3") == "override: unknown key 'train.step'; the nearest known key is 'train.steps'\n"
    )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--image", "none.png"], "image 'none.png' could not be decoded"),
        (["--device", "gpu"], "model.device 'gpu' cannot be used"),
        (["--device", "meta"], "model.device 'meta' cannot be used"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
    ],
)
def test_generate(args: list[str], expected: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(checkpoint), "Which?", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mmfn: error: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err


def test_eval_needs_a_set_and_a_place(
    make_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(make_config({"data.eval": None}))]) == 2
    assert "needs data.eval" in capsys.readouterr().err
    assert cli.main(["eval", str(make_config()), "--out", str(tmp_path / "no" / "a.json")]) == 2
    assert "lies in a folder that does not exist" in capsys.readouterr().err
    assert cli.main(["eval", str(make_config()), "--out", str(tmp_path)]) == 2
    assert "is a folder; give the path of a file" in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert f"mmfn eval CONFIG model.init=load model.path={tmp_path}" in capsys.readouterr().err


def test_a_run_is_no_checkpoint_but_has_one(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").symlink_to(checkpoint)
    assert cli.main(["generate", str(tmp_path / "run"), "Which?"]) == 2
    assert f"pass a complete checkpoint folder, such as {tmp_path / 'run' / 'checkpoint'}" in capsys.readouterr().err
    assert cli.main(["export", str(checkpoint), str(tmp_path / "out")]) == 2
    assert "is a Hugging Face checkpoint already; give a run with checkpoint.every" in capsys.readouterr().err


def test_nothing_to_learn_is_found_with_the_first_check_too(tmp_path: Path, complaint: Callable[..., str]) -> None:
    (tmp_path / "set.json").write_text(json.dumps([{"id": "mute", "messages": user("?")[:1]}]))
    for check in ("all", "first"):
        sentence = complaint({"data.train": str(tmp_path / "set.json"), "data.check": check})
        assert "sample 'mute' of" in sentence
        assert "has nothing to learn; give it an answer of the assistant that is learned" in sentence


def test_the_checkpoint_of_the_run_itself_is_kept(
    make_config: Callable[..., Path], checkpoint: Path, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    stored = tmp_path / "run" / "checkpoint"
    shutil.copytree(checkpoint, stored)
    (tmp_path / "run" / "config.yaml").write_text("")
    changes = {"model.path": str(stored), "model.init": "load", "output.overwrite": True}
    assert "model.path" in complaint(changes)
    mmfn.load_hf(stored)


def test_experts_that_transformers_would_misread_are_refused_before_training(make_config, small_demo, tmp_path, capsys):
    model = tmp_path / "moe"
    shutil.copytree(small_demo / "model", model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    text |= {"model_type": "qwen3_vl_moe_text", "num_experts": 4, "num_experts_per_tok": 2}
    text["moe_intermediate_size"] = text["hidden_size"] // 2  # gate and up together are square
    config |= {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    path = make_config({"model.path": str(model), "train.steps": 1, "data.eval": None})
    assert cli.main(["train", str(path)]) == 2
    assert "transformers would misread" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", str(path), "output.experts=transformers"]) == 0
