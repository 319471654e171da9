"""Does transformers hear what mmfn heard?

    python examples/verify_sound.py build/demo-audio

As `verify_export.py`, for a run of `configs/demo-audio.yaml`: transformers' own thinker, feature extractor, tokenizer
and chat template answer every held-out question.
"""

import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration, WhisperFeatureExtractor
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import _get_feat_extract_output_lengths
from verify_export import NEW_TOKENS, main, texts_of


@torch.no_grad()
def answers(entries: list[dict[str, Any]], root: Path, model: Any, tokenizer: Any, extractor: Any) -> list[str]:
    """Greedy answers of transformers to the first user message of each entry."""
    sounds = [samples(root / entry["audios"][0]) for entry in entries]
    settings = {"padding": True, "truncation": False, "return_attention_mask": True, "return_tensors": "pt"}
    heard = extractor(sounds, sampling_rate=extractor.sampling_rate, **settings)
    counts = _get_feat_extract_output_lengths(heard["attention_mask"].sum(1))
    texts = []
    for entry, count in zip(entries, counts.tolist(), strict=True):
        question = entry["messages"][0]["content"].removeprefix("<audio>")
        chat = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": question}]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        texts.append(text.replace("<|audio_pad|>", "<|audio_pad|>" * count))
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    given = {"input_features": heard["input_features"], "feature_attention_mask": heard["attention_mask"]}
    ids = model.generate(**inputs, **given, max_new_tokens=NEW_TOKENS, do_sample=False)
    return texts_of(ids[:, inputs["input_ids"].shape[1] :], model, tokenizer)


def samples(path: Path) -> Any:
    """float32 samples of a WAV file of one channel and 16 bits."""
    with wave.open(str(path), "rb") as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 2**15


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/verify_sound.py DEMO_FOLDER")
    sys.exit(main(Path(sys.argv[1]), Qwen3OmniMoeThinkerForConditionalGeneration, WhisperFeatureExtractor, answers))
