"""The processor and the template of a run: they go with its checkpoint, and those of another model are refused."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

import mmfn
from mmfn import cli
from mmfn.batch import IGNORE
from mmfn.interop.checkpoint import read_config
from mmfn.models.data.chat import read_template
from mmfn.train.build.match import check_match
from mmfn.train.build.processor import load_model_processor
from mmfn.train.build.run import prepare
from mmfn.train.chat_options import ChatOptions
from mmfn.train.config.load import load_config
from mmfn.train.data import Dataset

MakeConfig = Callable[..., Path]


OWN_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>
{% endgeneration %}{% else %}{% for p in m.content %}{% if p.type == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}!<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_the_template_of_a_run_is_that_of_its_checkpoint(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint renders as it was trained, and answers."""
    from transformers import AutoTokenizer

    (tmp_path / "own.jinja").write_text(OWN_TEMPLATE)
    settings = {"data.template": str(tmp_path / "own.jinja"), "train.steps": 1, "data.check": "first"}
    assert cli.main(["train", str(make_config(settings | {"lora.rank": 2, "lora.targets": [".*attention/q"]}))]) == 0
    (tmp_path / "own.jinja").unlink()  # it was read at the start
    for name in ("checkpoint", "adapter"):
        assert (tmp_path / "run" / name / "chat_template.jinja").read_text() == OWN_TEMPLATE
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint")
    chat = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nhi!<|im_end|>\n"
    assert cli.main(["generate", str(tmp_path / "run" / "checkpoint"), "hello", "--max-new-tokens", "2"]) == 0
    assert "error" not in capsys.readouterr().err


def test_a_template_needs_no_generation_block(
    small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint whose own template has none, and is like none of mmfn's, answers, and is trained by its marks."""
    mmfn.save_hf(tmp_path / "m", mmfn.init(read_config(small_demo / "model"), seed=0), assets=small_demo / "model")
    plain = re.sub(r"{% (end)?generation %}", "", OWN_TEMPLATE)
    (tmp_path / "m" / "chat_template.jinja").write_text(plain)
    assert cli.main(["generate", str(tmp_path / "m"), "hello", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().err == ""
    (tmp_path / "d.json").write_text(
        json.dumps([{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}])
    )
    processor = load_model_processor(str(tmp_path / "m"))
    sample = Dataset(tmp_path / "d.json", processor).sample(0)
    assert processor.chat.tokenizer.decode(sample.labels_T[sample.labels_T != IGNORE]) == "yo<|im_end|>\n"


def test_a_template_of_mmfn_by_its_name(
    make_config: MakeConfig, small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is saved with the checkpoint, with what ends an answer where the model's folder does not say it."""
    shutil.copytree(small_demo / "model", tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").unlink()
    settings = {"model.path": str(tmp_path / "m"), "data.template": "qwen3_vl_thinking", "train.steps": 1}
    assert cli.main(["train", str(make_config(settings))]) == 0
    checkpoint = tmp_path / "run" / "checkpoint"
    assert (checkpoint / "chat_template.jinja").read_text() == read_template("qwen3_vl_thinking")
    assert len(json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"]) == 2
    capsys.readouterr()
    assert cli.main(["train", str(make_config({"data.template": "qwen3_omni", "output.overwrite": True}))]) == 2
    assert "give a text file, or one of qwen3_vl, qwen3_vl_thinking" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_thinking": True}, "data.enable_thinking has no effect: the chat template does not read it"),
        ({"train_empty_thinking": False}, ""),
    ],
)
def test_options_that_have_no_effect(small_demo: Path, options: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        load_model_processor(str(small_demo / "model"), ChatOptions(**options))


def test_processor_of_another_model_is_refused(make_config: MakeConfig) -> None:
    run = prepare(load_config(make_config()), say=lambda text: None)
    vision = replace(run.model.cfg.vision, patch_size=8)
    other = replace(run.model, cfg=replace(run.model.cfg, vision=vision))
    with pytest.raises(ValueError, match=r"patch_size is 8 in config.json but 4 in preprocessor_config.json"):
        check_match(other, run.processor)
    small = replace(run.model, cfg=replace(run.model.cfg, vocab_size=281))
    with pytest.raises(ValueError, match="token id 281 but the model's vocab_size is 281"):
        check_match(small, run.processor)
    gray = replace(run.model, cfg=replace(run.model.cfg, vision=replace(run.model.cfg.vision, num_channels=4)))
    with pytest.raises(ValueError, match=r"in_channels is 4 in config.json but 3 in every decoded image; use a model"):
        check_match(gray, run.processor)
    swapped = {"image_token_id": run.model.cfg.video_token_id, "video_token_id": run.model.cfg.image_token_id}
    with pytest.raises(
        ValueError, match=r"image_token_id is \d+ in config.json but '<\|image_pad\|>' is \d+ in the tok"
    ):
        check_match(replace(run.model, cfg=replace(run.model.cfg, **swapped)), run.processor)
    with pytest.raises(ValueError, match=r"vision_start_token_id is 5 in config.json but '<\|vision_start\|>' is"):
        check_match(replace(run.model, hf_config={**run.model.hf_config, "vision_start_token_id": 5}), run.processor)


@pytest.mark.parametrize("command", ["train", "eval", "generate"])
def test_no_command_runs_with_the_processor_of_another_model(
    command: str, make_config: MakeConfig, small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, overrides = tmp_path / "m", (f"model.path={tmp_path / 'm'}", "model.init=load")
    mmfn.save_hf(model, mmfn.init(read_config(small_demo / "model"), seed=0), assets=small_demo / "model")
    for file in model.glob("*preprocessor_config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size": 8}))
    others = [str(model), "hello"] if command == "generate" else [str(make_config()), *overrides]
    assert cli.main([command, *others]) == 2
    assert re.search("patch_size is 4 in config.json but 8 in preprocessor_config.json", capsys.readouterr().err)
