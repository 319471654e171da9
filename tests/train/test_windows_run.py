"""Qwen2.5-VL from a folder as it was published: images and videos of frames, a run, its checkpoint, its answers."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

import mmfn
from mmfn import cli
from mmfn.batch import VIDEO
from mmfn.train.build.run import prepare
from mmfn.train.config.load import load_config
from mmfn.train.data import Dataset, load_processor
from mmfn.train.run.progress import Progress
from mmfn.train.run.training import run_training

RATE = 4  # frames per second
TOWER = {
    "depth": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "in_chans": 3,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "spatial_patch_size": 4,
    "temporal_patch_size": 2,
    "window_size": 8,
    "out_hidden_size": 96,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 3,
}


@pytest.fixture(scope="module")
def folder(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model folder with a config of this family, the values of its text at the top, and data with videos."""
    out = tmp_path_factory.mktemp("windows")
    (out / "model").mkdir()
    for path in (small_demo / "model").iterdir():
        (out / "model" / path.name).write_bytes(path.read_bytes())
    hf = json.loads((out / "model" / "config.json").read_text())
    text = {**hf.pop("text_config"), "rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 4]}, "rope_theta": 1e4}
    hf |= {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "vision_config": TOWER}
    del text["rope_parameters"], text["model_type"]
    text["bos_token_id"] = None
    (out / "model" / "config.json").write_text(json.dumps({**text, **hf}))
    video = json.loads((out / "model" / "video_preprocessor_config.json").read_text())
    video |= {"video_processor_type": "Qwen2VLVideoProcessor", "fps": RATE, "do_sample_frames": False}
    (out / "model" / "video_preprocessor_config.json").write_text(json.dumps(video))
    entries = json.loads((small_demo / "train.json").read_text())[:24]
    films = [{**entry, "images": [], "videos": [[*entry["images"]] * (3 + i)]} for i, entry in enumerate(entries[:6])]
    for entry in films:
        entry["messages"] = json.loads(json.dumps(entry["messages"]).replace("<image>", "<video>"))
        entry["id"] = f"{entry['id']} moving"
    (out / "train.json").write_text(json.dumps([*entries, *films]))
    (out / "eval.json").write_text(json.dumps([*entries[:4], *films[:4]]))
    return out


@pytest.fixture
def config(folder: Path, make_config: Callable[..., Path]) -> Path:
    files = {"model.path": "model", "data.train": "train.json", "data.eval": "eval.json"}
    sizes = {"data.token_buckets": [512], "data.tower_buckets": {"vision": [256]}}
    return make_config({**{key: str(folder / name) for key, name in files.items()}, **sizes, "train.steps": 3})


def test_a_video_is_written_once_and_timed_by_its_frames(folder: Path, full_demo: Path) -> None:
    processor = load_processor(folder / "model")
    sample = Dataset(folder / "train.json", processor, media_root=full_demo).sample(26)  # 5 frames
    (video,) = sample.videos
    assert (video.grid, video.seconds_per_grid, video.times) == ((3, 4, 4), 2 / RATE, ())
    text = processor.chat.tokenizer.decode(sample.tokens_T)
    assert f"<|vision_start|>{'<|video_pad|>' * 12}<|vision_end|>Which digit" in text
    model = mmfn.init(json.loads((folder / "model" / "config.json").read_text()), seed=0)
    times_T = model.family.positions(sample, model.cfg)[0][sample.kinds_T == VIDEO]
    assert (times_T - times_T[0]).tolist() == [0] * 4 + [1] * 4 + [3] * 4  # 1.5 positions per step, rounded down


def test_a_run_ends_in_a_checkpoint_of_the_published_names(
    folder: Path, config: Path, full_demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare(load_config(config), lambda text: None)
    result = run_training(run, Progress(num_steps=3, log_every=3, stream=io.StringIO()))
    assert all(record["loss"] > 0 and record["skipped"] == 0 for record in result.tally.last)
    evaluation = json.loads((config.parent / "run" / "eval.json").read_text())
    assert evaluation["num_answers"] == 8
    checkpoint = config.parent / "run" / "checkpoint"
    stored = load_file(checkpoint / "model.safetensors")
    assert {name.partition(".")[0] for name in stored} == {"visual", "model"}
    assert json.loads((checkpoint / "config.json").read_text())["hidden_size"] == 96
    oracle, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values())
    model = mmfn.load_hf(checkpoint)
    assert torch.equal(model.params["text"]["embed"]["weight"], oracle.get_input_embeddings().weight)
    image = json.loads((folder / "eval.json").read_text())[0]["images"][0]
    answer = ["generate", str(checkpoint), "Which digit is this?", "--image", str(full_demo / image)]
    assert cli.main([*answer, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out
