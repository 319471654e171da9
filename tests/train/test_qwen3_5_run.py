"""Runs and plans of a Qwen3.5: the block ahead is trained, and saved; periods of four blocks."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

import mmfn
from mmfn import tree
from mmfn.models import ahead_loss
from mmfn.parallel.planning import devices
from mmfn.parallel.program import Program
from mmfn.spec import freeze
from mmfn.train.build.run import prepare
from mmfn.train.build.step import build_step
from mmfn.train.config.learning import ObjectiveSection
from mmfn.train.config.load import load_config
from mmfn.train.planning import step_plan
from mmfn.train.run.progress import Progress
from mmfn.train.run.training import run_training
from tests.parallel import plan_cases
from tests.tiny import TINY, model_of

MakeConfig = Callable[..., Path]
AHEAD = ahead_loss(0)
DELTA = {
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mtp_num_hidden_layers": 1,
}


@pytest.fixture(scope="module")
def folder(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder with the config of a Qwen3.5."""
    out = tmp_path_factory.mktemp("qwen3_5")
    for path in (small_demo / "model").iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    hf = json.loads((out / "config.json").read_text())
    rope = {**hf["text_config"]["rope_parameters"], "partial_rotary_factor": 1.0}
    text = {**hf["text_config"], **DELTA, "model_type": "qwen3_5_text", "rope_parameters": rope}
    vision = {**hf["vision_config"], "model_type": "qwen3_5_vision", "deepstack_visual_indexes": []}
    hf |= {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}
    (out / "config.json").write_text(json.dumps({**hf, "text_config": text, "vision_config": vision}))
    return out


@pytest.mark.parametrize("weight", [None, 0.5])
def test_a_run_trains_and_saves_what_is_ahead(make_config: MakeConfig, folder: Path, weight: float | None) -> None:
    settings: dict[str, Any] = {"model.path": str(folder), "data.check": "first", "train.steps": 3}
    chosen = {} if weight is None else {"objective.ahead_weight": weight}
    said: list[str] = []
    run = prepare(load_config(make_config({**settings, **chosen})), said.append)
    source, used = ("config.json", 0.1) if weight is None else ("objective.ahead_weight", weight)
    assert f"{AHEAD}: weight {used:g}, of {source}" in said
    before = tree.map(lambda x: x.clone(), run.model.params)
    result = run_training(run, Progress(num_steps=3, log_every=1, stream=io.StringIO()))
    for record in result.tally.last:
        assert record["loss"] == pytest.approx(record["ce"] + used * record[AHEAD], rel=1e-5)
    saved = mmfn.load_hf(result.folder / "checkpoint")
    pairs = zip(tree.items(saved.params["mtp"]), tree.leaves(before["mtp"]), strict=True)
    assert all(bool((new != old).any()) for (_, new), old in pairs)
    _, info = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(
        result.folder / "checkpoint", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert json.loads((result.folder / "eval.json").read_text())


@pytest.mark.parametrize("frozen", [(), ("mtp/.*",)])
def test_a_weight_of_0_asks_that_the_block_ahead_is_frozen(frozen: tuple[str, ...]) -> None:
    model = model_of("delta")
    specs = model.family.specs(model.cfg)
    program = Program.of(freeze(specs, frozen) if frozen else specs)
    config = plan_cases.bare_config().model_copy(update={"objective": ObjectiveSection(ahead_weight=0.0)})
    if frozen:
        build_step(config, model, program)
        return
    with pytest.raises(ValueError, match=r"objective.ahead_weight is 0, so that 'mtp/.*; add mtp to freeze.parts"):
        build_step(config, model, program)


@pytest.mark.parametrize("name", ["delta", "delta_moe"])
@pytest.mark.parametrize("layout", [{}, {"dp": 2, "cp": 2, "kind": "gather", "remat": "full"}], ids=str)
def test_a_plan_extends_periods_of_four_blocks_exactly(name: str, layout: dict[str, Any]) -> None:
    """3 of one kind and 1 of the other, and a block of another stack behind them."""
    hf = TINY[name](22)
    hf["text_config"]["full_attention_interval"] = 4
    setup, chosen = plan_cases.make(hf=hf, **layout)
    cpu = devices.device("cpu")
    short, whole = (step_plan.plan(setup, chosen, cpu, all_layers=every) for every in (False, True))
    assert "and extended" in short.notes[-1]
    assert replace(short, notes=()) == replace(whole, notes=())
