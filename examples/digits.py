"""Handwritten digits as visual question answering: a dataset of real images and a tiny model, made offline in seconds.

    python examples/digits.py OUT

writes the 1,797 images of scikit-learn's digits (8x8 pixels) as PNG files, `train.json` (1,437) and `eval.json` (360)
in the messages/images format, the same with another question as `train_parity.json` and `eval_parity.json`, and
`model/`: the configuration of a Qwen3-VL of half a million parameters, a byte-level tokenizer with the special tokens
of Qwen, its chat template and its processor. Running it again writes the same bytes.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mmfn import rng
from mmfn.models.data.chat import read_template

QUESTIONS: dict[
    str, tuple[str, Callable[[int], str]]
] = {  # end of a data file's name -> what is asked, and the answer for a digit
    "": ("<image>Which digit is this?", str),
    "_parity": ("<image>Is this digit odd or even?", lambda digit: "odd" if digit % 2 else "even"),
}
NUM_TRAIN = 1437
# how Qwen tokenizers split text into words
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MARKS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)


def write_demo(out: Path) -> None:
    """Write images, all datasets and the model folder under `out`, which is created."""
    write_dataset(out)
    write_model(out / "model")


def write_dataset(out: Path) -> None:
    """PNG files and, for each question, two lists of conversations. The split is a fixed permutation."""
    digits = load_digits()
    (out / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{index:04d}.png" for index in range(len(digits.images))]
    for name, pixels in zip(names, digits.images, strict=True):
        Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(out / name)  # scikit-learn's range is 0 to 16
    order = rng.permutation(len(names), 0, "digits")
    for suffix, (question, answer) in QUESTIONS.items():
        asked = {"role": "user", "content": question}
        entries = []
        for index, (name, digit) in enumerate(zip(names, digits.target, strict=True)):
            messages = [asked, {"role": "assistant", "content": answer(digit)}]
            entries.append({"id": f"digit-{index:04d}", "messages": messages, "images": [name]})
        write_json(out / f"train{suffix}.json", [entries[i] for i in order[:NUM_TRAIN]])
        write_json(out / f"eval{suffix}.json", [entries[i] for i in order[NUM_TRAIN:]])


def write_model(out: Path) -> None:
    """Configuration, tokenizer, chat template and processor of the model; weights are drawn by the training run."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(out)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "im_end")}
    ids |= {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end", "endoftext")
    }
    write_json(out / "config.json", model_config(len(tokenizer), ids))
    stop = {"eos_token_id": [ids["im_end"], ids["endoftext"]], "pad_token_id": ids["endoftext"]}
    write_json(out / "generation_config.json", {"do_sample": False, **stop})
    pixels = {
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    image = {"size": {"shortest_edge": 256, "longest_edge": 256}, **pixels}  # 16x16 pixels: 16 patches, 4 tokens
    video = {
        "size": {"shortest_edge": 256, "longest_edge": 4096},
        **pixels,
        "fps": 2,
        "min_frames": 4,
        "max_frames": 16,
    }
    names = {"processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    write_json(out / "preprocessor_config.json", {**names, **image})
    names = {"processor_class": "Qwen3VLProcessor", "video_processor_type": "Qwen3VLVideoProcessor"}
    write_json(out / "video_preprocessor_config.json", {**names, **video})


def make_tokenizer(
    special: Sequence[str] = SPECIAL, template: str = "", end: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges (one token per byte) and the special tokens of Qwen, in their published order.

    `template`: of chats, by default that of Qwen3-VL. `end`: the token that ends an answer.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    raw.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    raw.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    raw.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=end,
        pad_token="<|endoftext|>",
        model_max_length=131072,
        clean_up_tokenization_spaces=False,
        chat_template=template or read_template("qwen3_vl"),
    )


def model_config(vocab_size: int, ids: dict[str, int]) -> dict[str, Any]:
    """`config.json` of a Qwen3-VL small enough to learn the task on one core in half a minute."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4], "mrope_interleaved": True}
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": vocab_size,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "max_position_embeddings": 512,
        "rope_parameters": rope,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "eos_token_id": ids["im_end"],
        "pad_token_id": ids["endoftext"],
    }
    vision = {
        "model_type": "qwen3_vl_vision",
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 96,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.05,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": "float32",
        "tie_word_embeddings": True,
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "text_config": text,
        "vision_config": vision,
    }


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path, help="folder to write, for example build/digits")
    out = parser.parse_args().out
    try:
        write_demo(out)
    except OSError as error:
        sys.exit(f"digits.py: error: cannot write {str(out)!r} ({error}); give a folder that can be written")
    print(f"data: {out / 'train.json'}, {out / 'eval.json'}; model: {out / 'model'}")
