import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from mmfn.train.data import Dataset, decode_image


def test_split_and_truth(digits):
    train, held_out = (json.loads((digits / f"{name}.json").read_text()) for name in ("train", "eval"))
    assert (len(train), len(held_out)) == (1437, 360)
    names = [entry["images"][0] for entry in train + held_out]
    assert len(set(names)) == 1797 == len(list((digits / "images").iterdir()))
    data = load_digits()
    for entry in (train + held_out)[::50]:
        index = int(entry["images"][0][7:11])
        assert entry["messages"][1] == {"role": "assistant", "content": str(data.target[index])}
        image = decode_image(digits / entry["images"][0])
        assert image.shape == (3, 8, 8)
        assert np.array_equal(image[0].numpy(), (data.images[index] * 255 / 16).astype(np.uint8))
        assert torch.equal(image[0], image[2])


def test_samples(digits, processor):
    data = Dataset(digits / "train.json", processor)
    sample = data.sample(7)
    answer = data.records[7].messages[1]["content"]
    text = processor.chat.tokenizer.decode(sample.tokens_T)
    pads = "<|image_pad|>" * 4
    assert text == (
        f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>Which digit is this?<|im_end|>\n"
        f"<|im_start|>assistant\n{answer}<|im_end|>\n"
    )
    assert sample.images[0].grid == (1, 4, 4)
    assert data.prompt(7)[1] == answer


def test_the_model_folder_loads_in_transformers(digits):
    import transformers

    config = transformers.AutoConfig.from_pretrained(digits / "model")
    with torch.device("meta"):
        model = transformers.Qwen3VLForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == 449_280
    tokenizer = transformers.AutoTokenizer.from_pretrained(digits / "model")
    assert len(tokenizer) == config.text_config.vocab_size == 282
    assert tokenizer.convert_ids_to_tokens(config.image_token_id) == "<|image_pad|>"
    assert tokenizer.convert_ids_to_tokens(config.video_token_id) == "<|video_pad|>"
    assert tokenizer.convert_ids_to_tokens(config.vision_start_token_id) == "<|vision_start|>"
    generation = transformers.GenerationConfig.from_pretrained(digits / "model")
    assert generation.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    images = transformers.Qwen2VLImageProcessorPil.from_pretrained(digits / "model")
    out = images(images=[np.zeros((8, 8, 3), np.uint8)], return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_running_it_again_writes_the_same_bytes(digits, digits_module, tmp_path):
    before = {path: path.read_bytes() for path in sorted(digits.rglob("*")) if path.is_file()}
    digits_module.write_demo(tmp_path)
    after = {digits / path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_usage(digits_module, monkeypatch):
    script = Path(digits_module.__file__)
    monkeypatch.setenv("PYTHONPATH", str(script.parents[1]))  # the package need not be installed
    out = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=False)
    assert out.returncode == 0
    assert "Handwritten digits" in out.stdout


def test_a_place_that_cannot_be_written(digits_module, monkeypatch, tmp_path):
    script = Path(digits_module.__file__)
    monkeypatch.setenv("PYTHONPATH", str(script.parents[1]))
    (tmp_path / "file").write_text("mine")
    out = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "file")], capture_output=True, text=True, check=False
    )
    assert out.returncode == 1
    assert out.stderr.startswith("digits.py: error: cannot write")
    assert out.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"
