"""Writes media.json beside this file: what transformers 5.23.0 with torchvision 0.28.0 makes of synthetic media.

Run it in an environment of its own (torchvision's wheel does not load beside a torch without CUDA, and then breaks
transformers; the schemas declared below make its pure Python part importable):

    pip install torch==2.13.0 transformers==5.23.0 pillow && pip install --no-deps torchvision==0.28.0
    python tests/goldens/make_media_goldens.py MODEL_FOLDER

MODEL_FOLDER is the `model` folder written by examples/digits.py: its tokenizer serves the rendered video prompt.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

QWEN3 = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP = {
    "patch_size": 14,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
TINY = {"patch_size": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGES = [  # (height, width, options, shortest_edge, longest_edge)
    (8, 8, TINY, 256, 256),
    (64, 96, QWEN3, 1024, 100000),  # no resize
    (61, 300, QWEN3, 65536, 400000),
    (427, 640, QWEN3, 65536, 200000),
    (427, 640, CLIP, 3136, 100000),
    (1, 150, CLIP, 3136, 100000),
    (333, 97, CLIP, 65536, 400000),
    (80, 112, TINY, 64, 4096),
    (36, 20, TINY, 64, 100000),  # halves of the factor: round to even
]
VIDEOS = [  # (frames, height, width, options, shortest_edge, longest_edge)
    (7, 90, 120, QWEN3, 4096, 200000),
    (2, 20, 31, QWEN3, 4096, 200000),
    (5, 16, 24, TINY, 64, 40960),
    (3, 12, 20, TINY, 8192, 40960),
    (6, 100, 64, CLIP, 3136, 60000),
]


def pixels(*shape: int) -> Tensor:
    """uint8[T, 3, H, W]: edges and ramps of all steepnesses, from integer arithmetic alone."""
    T, C, H, W = shape
    t, c, y, x = torch.meshgrid(*(torch.arange(n) for n in (T, C, H, W)), indexing="ij")
    return ((x * x // 3 + 5 * y + 37 * c + x * y // 7 + 11 * t * x) % 256).to(torch.uint8)


def summary(values: Tensor, grid: Tensor) -> dict[str, Any]:
    digest = hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
    return {
        "grid": grid.tolist(),
        "sha256": digest,
        "first": values.flatten()[:4].tolist(),
        "sum": values.double().sum().item(),
    }


def main(folder: Path) -> None:
    import transformers
    from transformers.video_utils import VideoMetadata

    def image_processor(options: dict[str, Any], low: int, high: int) -> Any:
        return transformers.Qwen2VLImageProcessor(**options, size={"shortest_edge": low, "longest_edge": high})

    def video_processor(options: dict[str, Any], low: int, high: int) -> Any:
        size = {"shortest_edge": low, "longest_edge": high}
        return transformers.Qwen3VLVideoProcessor(**options, size=size, cap_pixels_per_frame=False)

    images = []
    for height, width, options, low, high in IMAGES:
        out = image_processor(options, low, high)(images=[pixels(1, 3, height, width)[0]], return_tensors="pt")
        config = {**options, "size": {"shortest_edge": low, "longest_edge": high}}
        case = {"shape": [height, width], "config": config}
        images.append({**case, **summary(out["pixel_values"], out["image_grid_thw"][0])})
    videos = []
    for frames, height, width, options, low, high in VIDEOS:
        clip = pixels(frames, 3, height, width)
        metadata = [VideoMetadata(total_num_frames=frames, fps=2.0, frames_indices=list(range(frames)))]
        call = {"video_metadata": metadata, "do_sample_frames": False, "return_tensors": "pt"}
        out = video_processor(options, low, high)(videos=[clip], **call)
        config = {**options, "size": {"shortest_edge": low, "longest_edge": high}}
        case = {"shape": [frames, height, width], "config": config}
        videos.append({**case, **summary(out["pixel_values_videos"], out["video_grid_thw"][0])})
    sampling = []
    for total, fps in ((10, 2.0), (100, 25.0), (24, 8.0), (3, 30.0), (100000, 30.0), (61, 29.97)):
        meta = VideoMetadata(total_num_frames=total, fps=fps)
        indices = video_processor(QWEN3, 4096, 200000).sample_frames(meta)
        sampling.append({"total": total, "fps": fps, "count": len(indices), "indices": indices[:12].tolist()})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.Qwen3VLProcessor(
        image_processor=image_processor(TINY, 64, 4096),
        tokenizer=tokenizer,
        video_processor=video_processor(TINY, 64, 40960),
    )
    content = [{"type": "text", "text": "a:"}, {"type": "video"}, {"type": "image"}, {"type": "text", "text": " What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Two."}]
    metadata = [VideoMetadata(total_num_frames=10, fps=2.0, frames_indices=[0, 2, 4, 6, 9])]
    out = processor(
        text=[tokenizer.apply_chat_template(messages, tokenize=False)],
        images=[pixels(1, 3, 16, 32)[0]],
        videos=[pixels(5, 3, 16, 24)],
        video_metadata=metadata,
        do_sample_frames=False,
    )
    prompt = {"messages": messages, "times_s": [0, 1, 2, 3, 4.5], "text": tokenizer.decode(out["input_ids"][0])}
    prompt |= {"input_ids": list(out["input_ids"][0]), "kinds": list(out["mm_token_type_ids"][0])}
    goldens = {"images": images, "videos": videos, "sampling": sampling, "prompt": prompt}
    (Path(__file__).parent / "media.json").write_text(json.dumps(goldens, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
