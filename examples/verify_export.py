"""Does transformers read what mmfn wrote, and give the same answers?

    python examples/verify_export.py build/demo

Loads the exported checkpoint of a demo run with transformers' own model, tokenizer, chat template and image processor
(no mmfn code), answers every held-out question by its greedy `generate`, and compares with the run's eval.json. Exits 1
on any missing or unexpected weight and on any answer that differs.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration
from transformers.utils import logging

BATCH_SAMPLES, NEW_TOKENS = 120, 4


def main(folder: Path, model_class: Any, processor_class: Any, answer: Callable[..., list[str]]) -> int:
    """Compare the run in `folder`/run with transformers; returns the exit code.

    `model_class`, `processor_class`: of transformers; `answer`: as `answers`.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    checkpoint, root = folder / "run" / "checkpoint", folder
    model, info = model_class.from_pretrained(checkpoint, output_loading_info=True)
    problems = {name: keys for name, keys in info.items() if keys}
    if problems:
        print(f"verify: transformers does not load {checkpoint} cleanly: {problems}")
        return 1
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    processor = processor_class.from_pretrained(checkpoint)
    entries = json.loads((root / "eval.json").read_text(encoding="utf-8"))
    evaluation = json.loads((folder / "run" / "eval.json").read_text(encoding="utf-8"))
    ours = evaluation["answers"]
    theirs: list[str] = []
    for first in range(0, len(entries), BATCH_SAMPLES):
        theirs += answer(entries[first : first + BATCH_SAMPLES], root, model, tokenizer, processor)
    different = [(a["id"], a["prediction"], b) for a, b in zip(ours, theirs, strict=True) if a["prediction"] != b]
    for identity, mine, other in different:
        print(f"verify: sample {identity}: mmfn answered {mine!r}, transformers {other!r}")
    same = len(ours) - len(different)
    print(f"transformers loads the checkpoint; {same} of {len(ours)} of its greedy answers are the same as mmfn's")
    print(f"held-out accuracy: {evaluation['accuracy']:.4f}")
    print(f"report: {folder / 'run' / 'report.html'}")
    return 1 if different else 0


@torch.no_grad()
def answers(
    entries: list[dict[str, Any]], root: Path, model: Any, tokenizer: Any, processor: Any, new_tokens: int = NEW_TOKENS
) -> list[str]:
    """Greedy answers of transformers to the first user message of each entry."""
    images = [Image.open(root / entry["images"][0]).convert("RGB") for entry in entries]
    pixels = processor(images=images, return_tensors="pt")
    texts = []
    for entry, grid in zip(entries, pixels["image_grid_thw"], strict=True):
        question = entry["messages"][0]["content"].removeprefix("<image>")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        num_features = int(grid.prod()) // processor.merge_size**2
        texts.append(text.replace("<|image_pad|>", "<|image_pad|>" * num_features))
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    is_image = (inputs["input_ids"] == model.config.image_token_id).int()
    ids = model.generate(**inputs, **pixels, mm_token_type_ids=is_image, max_new_tokens=new_tokens, do_sample=False)
    return texts_of(ids[:, inputs["input_ids"].shape[1] :], model, tokenizer)


def texts_of(ids: torch.Tensor, model: Any, tokenizer: Any) -> list[str]:
    """What is generated, as mmfn decodes it: all tokens before the end mark."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    found = []
    for row in ids.tolist():
        length = next((i for i, token in enumerate(row) if token in ends), len(row))
        found.append(tokenizer.decode(row[:length], skip_special_tokens=False))
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/verify_export.py DEMO_FOLDER")
    sys.exit(main(Path(sys.argv[1]), Qwen3VLForConditionalGeneration, Qwen2VLImageProcessorPil, answers))
