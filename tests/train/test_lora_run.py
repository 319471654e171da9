"""Runs that train a part: what they write, how they go on from it, and what is refused before anything is written."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mmfn
from mmfn import cli, tree
from mmfn.interop import adapter
from mmfn.interop.checkpoint import read_config
from mmfn.lora import adapters_of, merge
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.weights.sharding import whole_params
from mmfn.train.build.run import Run, prepare
from mmfn.train.config.load import load_config
from mmfn.train.forward import Forward
from mmfn.train.run import loop
from mmfn.train.run.evaluate import evaluate
from mmfn.train.run.progress import Progress
from mmfn.train.run.result import Result
from mmfn.train.run.training import run_training

MakeConfig = Callable[..., Path]
LORA = {
    "model.init": "load",
    "lora.rank": 3,
    "lora.alpha": 6.0,
    "lora.targets": [r"text/layers/\d+/attention/(q|v)"],
    "lora.keep": [r"text/norm/weight"],
    "optimizer.lr": 2e-2,
}


@pytest.fixture(scope="module")
def base(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to start from."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model = mmfn.init(read_config(small_demo / "model"), seed=0)
    mmfn.save_hf(folder, model, assets=small_demo / "model")
    return folder


def prepared(config: Path, *overrides: str, say: Callable[[str], None] = lambda text: None) -> Run:
    return prepare(load_config(config, overrides), say)


def finished(config: Path, *overrides: str) -> Result:
    run = prepared(config, *overrides)
    steps = run.loaded.config.train.steps
    return run_training(run, Progress(num_steps=steps, log_every=steps, stream=io.StringIO()))


def leaves_equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def test_a_run_with_adapters(make_config: MakeConfig, base: Path, tmp_path: Path) -> None:
    """Adapter and merged checkpoint are of one model; both go on exactly where the run ended."""
    config = make_config(LORA | {"model.path": str(base)})
    said: list[str] = []
    prepared(config, say=said.append)
    assert said[0].endswith("parameters are trained (0.47%)")
    result = finished(config)
    assert result.saved == {name: tmp_path / "run" / name for name in ("adapter", "checkpoint")}
    plain = mmfn.load_hf(base)
    again = adapter.load(result.saved["adapter"], plain)
    assert tree.paths(again.params) == tree.paths(result.model.params)
    assert leaves_equal(again.params, result.model.params)
    assert any(x.b.abs().max() > 1e-3 for x in adapters_of(again.params).values())
    written = json.loads((result.saved["adapter"] / adapter.CONFIG).read_text())
    assert (written["r"], written["lora_alpha"]) == (3, 6)
    assert written["modules_to_save"] == ["model.language_model.norm"]
    assert written["base_model_name_or_path"] == str(base)

    held_out = prepared(config, f"output.path={tmp_path / 'other'}").held_out
    answers = [
        evaluate(Forward.of(model), held_out, batch_samples=24, max_new_tokens=3, eos_token_ids=())
        for model in (result.model, mmfn.load_hf(result.saved["checkpoint"]))
    ]
    assert answers[0].loss == pytest.approx(answers[1].loss, rel=1e-5)
    assert result.evaluation.loss == pytest.approx(answers[0].loss, rel=1e-5)

    specs = prepared(config, f"output.path={tmp_path / 'other'}").specs
    changes = {"model.path": str(base), "model.init": "load", "model.adapter": str(result.saved["adapter"])}
    more = prepared(make_config(changes | {"output.path": str(tmp_path / "more")}))
    assert leaves_equal(more.state["params"], result.model.params)
    assert more.specs == specs
    with pytest.raises(ValueError, match=r"freeze covers 'text/norm/weight', which model.adapter holds in full"):
        prepared(make_config(changes | {"output.path": str(tmp_path / "more"), "freeze.patterns": ["text/norm/.*"]}))
    new_leaves = dict(tree.items(loop.train(more, lambda record: None)["params"]))
    moved = {path for path, leaf in tree.items(plain.params) if not torch.equal(leaf, new_leaves[path])}
    assert moved == {"text/norm/weight"}


@pytest.mark.parametrize(("chosen", "written"), [("merged", "checkpoint"), ("separate", "adapter")])
def test_what_is_written(chosen: str, written: str, make_config: MakeConfig, base: Path, tmp_path: Path) -> None:
    result = finished(make_config(LORA | {"model.path": str(base), "train.steps": 1}), f"output.adapter={chosen}")
    assert result.saved == {written: tmp_path / "run" / written}
    assert {"adapter", "checkpoint"} & {entry.name for entry in (tmp_path / "run").iterdir()} == {written}
    assert str(result.saved[written]) in (tmp_path / "run" / "report.html").read_text()


def test_a_run_on_a_mesh(make_config: MakeConfig, base: Path, tmp_path: Path) -> None:
    """Shards are cut from the same draws, the same is dropped, and all ranks write one adapter."""
    changes = {"model.path": str(base), "train.steps": 2, "data.check": "first", "lora.dropout": 0.2}
    config = make_config(LORA | changes)
    expected = finished(config, f"output.path={tmp_path / 'one'}")
    loaded = load_config(config, ["layout.dp=2", "layout.cp=2"])

    def rank(mesh: Mesh) -> tuple[Result, Any]:
        place = Place(device=torch.device("cpu"), mesh=mesh, host=mesh)
        progress = Progress(num_steps=2, log_every=2, stream=io.StringIO())
        result = run_training(prepare(loaded, lambda text: None, place), progress)
        return result, whole_params(result.model.params, mesh)

    results, wholes = zip(*virtual(loaded.config.layout.sizes, rank), strict=True)
    assert [list(result.saved) for result in results] == [["adapter", "checkpoint"]] * 4
    for name in ("loss", "grad_norm"):
        assert results[0].tally.last[0][name] == pytest.approx(expected.tally.last[0][name], rel=1e-4)
    assert results[0].tally.last[1]["loss"] == pytest.approx(expected.tally.last[1]["loss"], rel=2e-3)
    again = adapter.load(results[0].saved["adapter"], mmfn.load_hf(base))
    assert leaves_equal(again.params, wholes[0])
    merged = mmfn.load_hf(results[0].saved["checkpoint"])
    for leaf, want in zip(tree.leaves(merged.params), tree.leaves(merge(again.params)), strict=True):
        torch.testing.assert_close(leaf, want, rtol=1e-6, atol=1e-7)


def test_dropout_goes_on_with_the_adapter(make_config: MakeConfig, base: Path, tmp_path: Path) -> None:
    """It is written beside the weights, read where these are trained on, and no part of the merged model."""
    result = finished(make_config(LORA | {"model.path": str(base), "lora.dropout": 0.1}))
    assert all(record["skipped"] == 0 for record in result.tally.last)
    assert json.loads((result.saved["adapter"] / adapter.CONFIG).read_text())["lora_dropout"] == 0.1
    changes = {"model.path": str(base), "model.init": "load", "model.adapter": str(result.saved["adapter"])}
    more = prepared(make_config(changes | {"output.path": str(tmp_path / "more")}))
    assert {x.dropout for x in adapters_of(more.specs).values()} == {0.1}
    merged, plain = mmfn.load_hf(result.saved["checkpoint"]), mmfn.load_hf(base)
    assert tree.paths(merged.params) == tree.paths(plain.params)


def test_commands_take_an_adapter(
    make_config: MakeConfig, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(LORA | {"model.path": str(base)})
    assert cli.main(["train", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    run = tmp_path / "run"
    assert f"adapter: {run / 'adapter'}" in lines
    assert f"checkpoint: {run / 'checkpoint'}" in lines
    outputs = []
    for args in ([str(base), "--adapter", str(run / "adapter")], [str(run / "checkpoint")]):
        assert cli.main(["generate", args[0], "Which digit?", *args[1:], "--max-new-tokens", "4"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert cli.main(["plan", str(config), "--device", "cpu", "--tokens", "256", "--sample-tokens", "64"]) == 0
    planned = capsys.readouterr().out
    assert "2,112 of 451,296 parameters are trained" in planned
    assert "text/layers/*/attention/q/lora/weight/a x2" in planned
    plain = make_config({"model.path": str(base), "model.init": "load"})
    for override in (f"model.adapter={run / 'adapter'}", f"model.path={run / 'checkpoint'}"):
        assert cli.main(["eval", str(plain), override]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[2] == outputs[3] == next(f"{line}\n" for line in lines if line.startswith("held-out"))


def test_a_frozen_part_in_a_run(make_config: MakeConfig, base: Path) -> None:
    parts = {"freeze.parts": ["vision_encoder", "vision_projector"], "freeze.patterns": [r"text/embed/weight"]}
    config = make_config(parts | {"model.path": str(base), "model.init": "load", "train.steps": 2})
    result, before = finished(config), dict(tree.items(mmfn.load_hf(base).params))
    after = dict(tree.items(mmfn.load_hf(result.saved["checkpoint"]).params))
    same = {path for path, leaf in after.items() if torch.equal(leaf, before[path])}
    assert same == {path for path in before if path.startswith("vision/") or path == "text/embed/weight"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"freeze.parts": ["audio_encoder"]},
            "freeze.parts has 'audio_encoder' but this model's parts are vision_encoder",
        ),
        ({"freeze.parts": ["lm_head"]}, "freeze.parts has 'lm_head'"),
        ({"freeze.patterns": ["text/nrom/weight"]}, "pattern 'text/nrom/weight' matches none of"),
        ({"freeze.patterns": [".*"]}, "leaves no parameter to train"),
        ({"lora.alpha": 8.0}, "alpha has no effect without rank"),
        ({"lora.rank": 2, "lora.dropout": 1.0}, "lora.dropout is 1.0 but input should be less than 1"),
        ({"lora.dropout": 0.1}, "dropout has no effect without rank"),
        ({"lora.rank": 2, "lora.targets": ["head"]}, "pattern 'head' matches none of"),
        ({"lora.rank": 2, "model.adapter": "x"}, "lora has no effect with model.adapter"),
        ({"output.adapter": "merged"}, "output.adapter has no effect without LoRA"),
        ({"model.adapter": "nowhere"}, r"adapter_config.json does not exist"),
        ({"lora.rank": 2, "lora.keep": ["vision/merger/norm/bias"]}, "'vision/merger/norm/weight' is not trained"),
        ({"lora.rank": 2, "lora.keep": ["text/embed/weight"]}, "'text/embed/weight' is trained in full and tied"),
        ({"lora.rank": 2, "output.adapter": "separate"}, "'separate' saves nowhere the base that model.init"),
        ({"lora.rank": 2, "freeze.parts": ["vision_encoder"]}, "freeze has no effect: LoRA already freezes all"),
        (
            {"lora.rank": 2, "lora.keep": ["vision/merger/norm/.*"], "freeze.parts": ["text_decoder"]},
            "freeze covers the adapter 'text/layers/0/attention/k/lora/weight/a' but LoRA already freezes",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str, make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(make_config(changes))
    assert not (tmp_path / "run").exists()
