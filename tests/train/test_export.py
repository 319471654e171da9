"""`mmfn export` and `mmfn convert`: what a run of any mesh saved becomes what it left at its end, byte for byte."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mmfn
from mmfn import cli, tree
from mmfn.interop.checkpoint import read_config
from mmfn.train.config.load import load_config
from mmfn.train.run import state_export, stored
from tests.parallel.allocated import peak_of
from tests.train.resume_cases import run

MakeConfig = Callable[..., Path]
LORA = ("lora.rank=2", r"lora.targets=['text/layers/\d+/attention/(q|v)']", "optimizer.lr=2e-2")
CASES: dict[str, tuple[str, ...]] = {
    "one device": (),
    "mesh": ("layout.dp=2", "layout.cp=2"),
    "averages": ("layout.dp=2", "optimizer.ema_decay=0.5", "output.weights=ema"),
    "adapters": ("layout.dp=2", *LORA),
    "bfloat16": ("model.dtype=bfloat16", "data.image_max_pixels=900"),
}


@pytest.fixture
def base(small_demo: Path, tmp_path: Path) -> Path:
    """A checkpoint to start from."""
    model = mmfn.init(read_config(small_demo / "model"), seed=0)
    mmfn.save_hf(tmp_path / "base", model, assets=small_demo / "model")
    return tmp_path / "base"


def trained(make_config: MakeConfig, base: Path, *overrides: str) -> Path:
    """A run of two steps with a checkpoint behind each."""
    changes: dict[str, Any] = {"model.path": str(base), "model.init": "load", "data.eval": None, "data.check": "first"}
    path = make_config(changes | {"train.steps": 2, "checkpoint.every": 1})
    run(load_config(path, overrides))
    return base.parent / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_the_last_checkpoint_is_what_the_run_left(
    case: str, make_config: MakeConfig, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(make_config, base, *CASES[case])
    assert cli.main(["export", str(folder), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"checkpoint of step 2: {tmp_path / 'out'}\n"
    found, want = content(tmp_path / "out"), content(folder / "checkpoint")
    assert found.keys() == want.keys()
    for name in want:
        if case != "adapters" or name != "model.safetensors":
            assert found[name] == want[name], name
    if case == "adapters":  # merged here as a whole, there by rows
        pairs = zip(
            *(tree.leaves(mmfn.load_hf(f).params) for f in (tmp_path / "out", folder / "checkpoint")), strict=True
        )
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in pairs)
        assert cli.main(["export", str(folder), str(tmp_path / "own"), "--adapter", "separate"]) == 0
        assert content(tmp_path / "own") == content(folder / "adapter")


def test_exports_on_the_way(make_config: MakeConfig, base: Path, tmp_path: Path) -> None:
    """Behind every n-th step but the last one, what the run would leave if it ended there; a resume writes it again."""
    changes: dict[str, Any] = {"model.path": str(base), "model.init": "load", "data.eval": None, "data.check": "first"}
    common = ["layout.dp=2", "optimizer.ema_decay=0.5", "output.weights=ema", *LORA, "schedule.kind=constant"]
    for name, steps in (("long", 4), ("short", 2)):
        overrides = [*common, f"train.steps={steps}", f"output.path={tmp_path / name}"]
        overrides += ["output.export_every=2", "checkpoint.every=1"] if name == "long" else []
        run(load_config(make_config(changes), overrides))
    found, want = tmp_path / "long" / "exports" / "iter_0000002", tmp_path / "short"
    assert {path.name for path in found.parent.iterdir()} == {found.name}
    for kind in ("adapter", "checkpoint"):
        assert content(found / kind) == content(want / kind)
    assert content(tmp_path / "long" / "checkpoint") != content(want / "checkpoint")


def test_options(make_config: MakeConfig, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(make_config, base, "layout.dp=2", "optimizer.ema_decay=0.5", "output.weights=ema")
    first = folder / "state" / "iter_0000001"
    assert cli.main(["export", str(first), str(tmp_path / "one"), "--to-bf16", "--weights", "last"]) == 0
    assert cli.main(["export", str(folder / "state"), str(tmp_path / "two"), "--dtype", "bfloat16"]) == 0
    one, two, end = (mmfn.load_hf(f) for f in (tmp_path / "one", tmp_path / "two", folder / "checkpoint"))
    assert {leaf.dtype for model in (one, two) for leaf in tree.leaves(model.params)} == {torch.bfloat16}
    for a, b in zip(tree.leaves(two.params), tree.leaves(end.params), strict=True):
        assert torch.equal(a, b.bfloat16())
    assert any(not torch.equal(a, b) for a, b in zip(tree.leaves(one.params), tree.leaves(two.params), strict=True))
    capsys.readouterr()

    def refused(*args: str) -> str:
        assert cli.main(["export", *args]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    out = str(tmp_path / "three")
    assert "two exists and is not an empty folder" in refused(str(folder), str(tmp_path / "two"))
    assert "the run trained no adapters" in refused(str(folder), out, "--adapter", "separate")
    assert "base is a Hugging Face checkpoint already; give a run" in refused(str(base), out)
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    shutil.copytree(base, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    for file in (tmp_path / "other").glob("*.safetensors"):
        file.unlink()
    said = refused(str(folder), out, "--model", str(tmp_path / "other"))
    assert "neither model.safetensors nor" in said or "name the model that was trained by --model" in said
    (first.parent / "iter_0000002" / "rank_00001.safetensors").unlink()
    assert cli.main(["export", str(folder), out]) == 0
    said = capsys.readouterr().out
    assert said.startswith("skipped iter_0000002: ")
    assert said.endswith(f"checkpoint of step 1: {out}\n")
    data = bytearray((first / "rank_00000.safetensors").read_bytes())
    for place in range(len(data) // 2, len(data), 5000):  # some of it is the optimizer's, which is not read
        data[place] ^= 1
    (first / "rank_00000.safetensors").write_bytes(data)
    assert "is damaged" in refused(str(first), str(tmp_path / "four"))
    assert not (tmp_path / "four").exists()


def test_an_export_holds_one_leaf(make_config: MakeConfig, base: Path, tmp_path: Path) -> None:
    folder = trained(make_config, base, "model.init=random")  # a mapped file would count as allocated
    checkpoint, _ = stored.open_state(folder)
    config = state_export.settings_of(checkpoint)
    peak = peak_of(lambda: state_export.export_state(checkpoint, config, tmp_path / "out", "checkpoint", None))
    sizes = [leaf.nbytes for leaf in tree.leaves(mmfn.load_hf(tmp_path / "out").params)]
    assert peak < 3 * max(sizes) + 2**16
    assert peak < 0.5 * sum(sizes)


def test_convert(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dcp, out = str(tmp_path / "dcp"), str(tmp_path / "out")
    assert cli.main(["convert", "hf-to-dcp", str(base), dcp, "--tied-head"]) == 0
    assert capsys.readouterr().out.endswith(f" tensors: {dcp}\n")
    assert cli.main(["convert", "dcp-to-hf", dcp, out, "--model", str(base)]) == 0
    assert capsys.readouterr().out == f"layout 'hub' read; checkpoint: {out}\n"
    assert content(tmp_path / "out") == content(base)
    assert cli.main(["convert", "dcp-to-hf", dcp, out, "--model", str(base)]) == 2
    assert "out exists and is not an empty folder" in capsys.readouterr().err


def test_a_run_is_exported_not_converted(
    make_config: MakeConfig, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = trained(make_config, base), str(tmp_path / "out")
    for source in (folder, folder / "state"):
        assert cli.main(["convert", "dcp-to-hf", str(source), out, "--model", str(base)]) == 2
        wanted = f"{folder / 'state'} holds checkpoints of a run of mmfn; use mmfn export {source} {out}"
        assert wanted in capsys.readouterr().err
