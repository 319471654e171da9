"""The JSON schema of the settings: it is current, it takes every config there is, and refuses what a config refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from mmfn import cli
from mmfn.train.config.json_schema import json_schema
from mmfn.train.config.load import known_keys, read_settings
from mmfn.train.config.schema import Config
from tests.train.json_schema import faults

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SCHEMA = json_schema()
MINIMAL: dict[str, dict[str, Any]] = {
    "model": {"path": "m"},
    "data": {"train": "t", "token_buckets": [64], "tower_buckets": {"vision": [32]}},
    "optimizer": {"lr": 1e-3},
    "train": {"steps": 1},
    "output": {"path": "o"},
}
RIGHT = (
    "optimizer.betas=[0.9, 0.95]",
    "optimizer.lr=1",
    "data.train=[a, {path: b, weight: 2}]",
    "data.train={path: b}",
    "data.eval=null",
    "layout.remat_stacks={vision: {kind: full, every: 2}}",
    "layout.offload=[activations, optimizer]",
    "layout.compute_rules={'a.*': float32}",
    "schedule.groups={a: {lr: 1e-3}}",
    "lora.targets=[a]",
    "data.batch_samples=null",  # a rule asks for batch_tokens then
    "train.seed=0",
    "train.seed=9223372036854775807",
    "train.steps=null",  # a rule asks for epochs then
    "train.profile=[2, 3]",
)
WRONG = (
    "train.steps=0",
    "train.steps=9223372036854775808",
    "data.batch_samples=0",
    "train.seed=9223372036854775808",
    "train.steps=ten",
    "train.epochs=0",
    "train.profile=[3]",
    "train.compile=all",
    "train.steps=true",
    "optimizer.betas=[0.9]",
    "optimizer.betas=[0.9, 1]",
    "optimizer.betas=[0.9, 0.9, 0.9]",
    "data.token_buckets=[]",
    "data.token_buckets=[0]",
    "data.token_buckets=64",
    "data.tower_buckets={vision: 4}",
    "data.train=[]",
    "data.train=[{weight: 2}]",
    "data.train=[{path: a, colour: 2}]",
    "data.workers=65",
    "layout.offload=[everything]",
    "layout.remat_stacks={vision: {every: 2}}",
    "layout.compute_rules={'a.*': float16}",
    "schedule.groups={a: {kind: linear}}",
    "model.path=3",
    "lora.dropout=1",
)


def test_the_file_is_current() -> None:
    assert json.loads((ROOT / "configs" / "schema.json").read_text()) == SCHEMA, "run make schema"


def test_every_setting_is_described() -> None:
    sections = {
        name: SCHEMA["$defs"][section["$ref"].removeprefix("#/$defs/")]
        for name, section in SCHEMA["properties"].items()
    }
    described = {f"{name}.{key}": item for name, s in sections.items() for key, item in s["properties"].items()}
    assert list(described) == list(known_keys())
    assert {key: item["description"] for key, item in described.items()} == known_keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_is_taken(path: Path) -> None:
    values = {name: dict(section) for name, section in read_settings(path).values.items()}
    assert list(faults(values, SCHEMA, SCHEMA)) == []
    depth = len(path.relative_to(ROOT / "configs").parts) - 1
    assert path.read_text().startswith(f"# yaml-language-server: $schema={'../' * depth}schema.json\n")


@pytest.mark.parametrize("setting", [*RIGHT, *WRONG])
def test_it_says_what_a_config_says(setting: str) -> None:
    key, _, text = setting.partition("=")
    section, _, name = key.partition(".")
    value = 1e-3 if text == "1e-3" else yaml.safe_load(text.replace("1e-3", "0.001"))
    values = {**MINIMAL, section: {**MINIMAL.get(section, {}), name: value}}
    is_right = setting in RIGHT
    assert (list(faults(values, SCHEMA, SCHEMA)) == []) is is_right
    if is_right:
        Config.model_validate(values)
    else:
        with pytest.raises(ValidationError):
            Config.model_validate(values)


def test_unknown_and_missing_keys() -> None:
    assert list(faults({**MINIMAL, "optimiser": {}}, SCHEMA, SCHEMA)) == [".optimiser: unknown"]
    assert list(faults({**MINIMAL, "model": {"path": "m", "size": 1}}, SCHEMA, SCHEMA)) == [".model.size: unknown"]
    assert list(faults({**MINIMAL, "model": {}}, SCHEMA, SCHEMA)) == [".model.path: missing"]
    lacking = {name: section for name, section in MINIMAL.items() if name != "train"}
    assert list(faults(lacking, SCHEMA, SCHEMA)) == [".train: missing"]


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`mmfn config schema` prints or writes it; `mmfn config show` prints every value, its origin and what is idle."""
    assert cli.main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
    assert cli.main(["config", "schema", "--out", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == SCHEMA
    capsys.readouterr()
    assert cli.main(["config", "schema", "--out", str(tmp_path / "none" / "s.json")]) == 2
    assert "lies in a folder that does not exist" in capsys.readouterr().err
    assert cli.main(["config", "schema", "--out", str(tmp_path / "s.json")]) == 0
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL, sort_keys=False))
    assert cli.main(["config", "schema", "--out", str(path)]) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert cli.main(["config", "show", str(path), "train.steps=7", "layout.kind=ring"]) == 0
    printed = capsys.readouterr().out
    origins = {line.split(":")[0].strip(): line.partition("# ")[2] for line in printed.splitlines()}
    assert origins["steps"] == "command line"
    assert origins["lr"] == f"{path}:11"
    assert origins["seed"] == "default"
    assert printed.splitlines()[-1].startswith("# note: layout.kind has no effect with cp 1")
    assert {f"{s}.{k}" for s, section in yaml.safe_load(printed).items() for k in section} == set(known_keys())
    assert cli.main(["config", "show", str(path), "train.steps=0"]) == 2
