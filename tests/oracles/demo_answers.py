"""What transformers answers of its own, greedily, from the checkpoint of a demo's run: text, and videos."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.video_utils import VideoMetadata

from tests.oracles.torchvision import in_place_of_torchvision, library_class

MARKS = {"vision_start_token": "<|vision_start|>", "video_token": "<|video_pad|>", "vision_end_token": "<|vision_end|>"}


@torch.no_grad()
def library_answers(folder: Path, max_new_tokens: int) -> Iterator[str]:
    """The answer to each entry of `folder`/eval.json: the tokens before the end mark, decoded."""
    checkpoint = folder / "run" / "checkpoint"
    model, loaded = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loaded.values()), loaded
    tokenizer, videos = AutoTokenizer.from_pretrained(checkpoint), Videos(checkpoint)
    for entry in json.loads((folder / "eval.json").read_text(encoding="utf-8")):
        clips = [folder / name for name in entry.get("videos", ())]
        question = {"type": "text", "text": entry["messages"][0]["content"].removeprefix("<video>")}
        chat = [{"role": "user", "content": [*({"type": "video"} for _ in clips), question]}]
        text, given = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), {}
        for clip in clips:
            given, written = videos(clip)
            text = text.replace("".join(MARKS.values()), written)
        inputs = tokenizer([text], return_tensors="pt", add_special_tokens=False)
        kinds = 2 * (inputs["input_ids"] == model.config.video_token_id).int()
        limits = {"max_new_tokens": max_new_tokens, "do_sample": False}
        ids = model.generate(**inputs, **given, mm_token_type_ids=kinds, **limits)[0, inputs["input_ids"].shape[1] :]
        end = torch.isin(ids, torch.tensor(model.generation_config.eos_token_id)).nonzero()
        yield tokenizer.decode(ids[: int(end[0, 0])] if len(end) else ids, skip_special_tokens=False)


class Videos:
    """The library's processor of videos and what it writes of one into the text."""

    def __init__(self, checkpoint: Path) -> None:
        settings = json.loads((checkpoint / "video_preprocessor_config.json").read_text(encoding="utf-8"))
        settings = {name: value for name, value in settings.items() if not name.endswith("_type")}
        self.processor = library_class("qwen3_vl.video_processing_qwen3_vl.Qwen3VLVideoProcessor")(**settings)
        whole = library_class("qwen3_vl.processing_qwen3_vl.Qwen3VLProcessor")
        self.writer = object.__new__(whole)  # made as usual it asks for torchvision
        vars(self.writer).update(MARKS, video_processor=self.processor)

    def __call__(self, path: Path) -> tuple[dict[str, Any], str]:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
            rate = float(stream.average_rate)
        num, height, width, _ = frames.shape
        sizes = {"total_num_frames": num, "height": height, "width": width, "duration": num / rate}
        metadata = VideoMetadata(**sizes, fps=rate, frames_indices=list(range(num)))
        with in_place_of_torchvision():
            found = self.processor(
                videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
                video_metadata=[metadata],
                do_sample_frames=False,
                return_tensors="pt",
                return_metadata=True,
            )
        given = {name: found[name] for name in ("pixel_values_videos", "video_grid_thw")}
        return given, self.writer.replace_video_token(found, 0)
