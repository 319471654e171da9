"""The demo of LoRA, end to end: a trained model learns another question, and peft gives the same answers."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmfn import cli
from mmfn.interop.checkpoint import read_config
from mmfn.models import family
from mmfn.spec import num_params, num_trained, trained_paths
from mmfn.train.build.model import model_specs
from mmfn.train.config.load import load_config

ROOT = Path(__file__).parents[2]


def test_what_the_config_trains(full_demo: Path) -> None:
    """Under 5 % of the parameters, none of them in the vision tower."""
    config = load_config(ROOT / "configs" / "lora.yaml").config
    hf_config = read_config(full_demo / "model")
    found = family(hf_config["model_type"])
    specs = model_specs(config, found, found.config_from_hf(hf_config))
    assert num_trained(specs) < 0.05 * num_params(specs)
    assert not [path for path in trained_paths(specs) if path.startswith("vision/")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
def test_the_demo_learns_another_question(
    full_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for entry in full_demo.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    for name in ("demo", "lora"):
        text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").replace("build/demo", str(tmp_path))
        config: dict[str, Any] = yaml.safe_load(text)
        config["data"]["root"] = str(full_demo)
        config["train"]["allocator"] = "default"  # the other is for the whole process
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        assert cli.main(["train", str(tmp_path / f"{name}.yaml")]) == 0
    assert json.loads((tmp_path / "lora" / "eval.json").read_text())["accuracy"] >= 0.9
    monkeypatch.syspath_prepend(ROOT / "examples")
    spec = importlib.util.spec_from_file_location("verify_adapter", ROOT / "examples" / "verify_adapter.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("verify_export", None)
    assert module.main(tmp_path) == 0
    assert "360 of 360 of its greedy answers are the same as mmfn's" in capsys.readouterr().out
