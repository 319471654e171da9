"""Media from the file to the batch: decode, preprocess, render, pack, here and by Hugging Face's processors.

    PYTHONPATH=.:examples python benchmarks/data.py [--rounds 15]

Both sides end with what is copied to a device. There the library's floats are computed with, and mmfn's bytes become
the same floats, which takes an accelerator no time worth counting; "in floats" counts that too, done by the CPU.

Samples per second of one core's time (that of all threads is counted), by the median of some rounds, in turns, and the
median of the rounds' ratios. Each column has a process of its own, as workers of data have: what one gives back to the
allocator would decide how much fresh memory the next has to touch. Synthetic files: JPEG of a megapixel, a video of a
minute at 30 frames per second of which 2 are read per second, sounds of 30 s. Images are resized by torch itself in
torchvision's place, which calls that; "without torchvision" is what the library does where that is not installed.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import digits
import dtmf
import numpy as np
import soundfile
import torch
import transformers
from PIL import Image, ImageFilter
from transformers.audio_utils import load_audio
from transformers.image_utils import load_image
from transformers.video_utils import load_video

from mmfn.batch import Batch, in_floats
from mmfn.models import family
from mmfn.train.build.processor import load_model_processor
from mmfn.train.data import Dataset
from tests.oracles.torchvision import in_place_of_torchvision, library_class
from tests.train.data.clips import write_clip

PUBLISHED = {
    "image": {"min_pixels": 65_536, "max_pixels": 16_777_216},
    "video": {"min_pixels": 4096, "max_pixels": 25_165_824, "min_frames": 4, "max_frames": 768},
}
PATCHES = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
QUESTION, ANSWER = "What is there to see and to hear?", "Something that was made for a benchmark. " * 8
SHOWN = {"pil": "image"}  # media by kind of row, where they differ
WARM = 3  # rounds that are not counted


def write_media(folder: Path) -> dict[str, tuple[str, str]]:
    """`{row of the table: (kind, file)}`."""
    draw = np.random.default_rng(0)
    rough = Image.fromarray(draw.integers(0, 256, (125, 125, 3), np.uint8)).resize(
        (1000, 1000), Image.Resampling.BICUBIC
    )
    rough.filter(ImageFilter.GaussianBlur(1)).save(folder / "a.jpg", quality=90)
    rows = {"image, JPEG 1000 x 1000": ("image", "a.jpg"), "the same, without torchvision": ("pil", "a.jpg")}
    for name, group in (("a key a second", "30"), ("a key in 8 s", "250")):
        file = f"v{group}.mp4"
        write_clip(folder / file, num=1800, rate=30, size=(640, 360), options={"g": group})
        rows[f"video, 60 s of H.264, 640 x 360, {name}"] = ("video", file)
    wave = 0.1 * draw.standard_normal((30 * 44_100, 2))
    for suffix in ("wav", "flac", "mp3"):
        soundfile.write(folder / f"s.{suffix}", wave, 44_100)
        rows[f"sound, 30 s of {suffix}, 44.1 kHz stereo"] = ("audio", f"s.{suffix}")
    soundfile.write(folder / "own.wav", wave[: 30 * 16_000, 0], 16_000)
    rows["sound, 30 s of wav, 16 kHz mono"] = ("audio", "own.wav")
    return rows


def write_models(folder: Path) -> dict[str, Path]:
    """A folder of a model that sees, with the settings of Qwen3-VL's, and of one that hears, with Qwen3-Omni's."""
    digits.write_model(folder / "sees")
    sizes = {
        kind: {"shortest_edge": PUBLISHED[kind]["min_pixels"], "longest_edge": PUBLISHED[kind]["max_pixels"]}
        for kind in PUBLISHED
    }
    frames = {"fps": 2, "min_frames": 4, "max_frames": 768}
    (folder / "sees" / "preprocessor_config.json").write_text(json.dumps({**PATCHES, "size": sizes["image"]}))
    (folder / "sees" / "video_preprocessor_config.json").write_text(
        json.dumps({**PATCHES, "size": sizes["video"], **frames})
    )
    dtmf.write_model(folder / "hears")
    return {"image": folder / "sees", "pil": folder / "sees", "video": folder / "sees", "audio": folder / "hears"}


def image_class(kind: str) -> Any:
    """The library's class of image processors, of either backend."""
    name = "Qwen2VLImageProcessorPil" if kind == "pil" else "Qwen2VLImageProcessor"
    return library_class(f"qwen2_vl.image_processing_{'pil_' if kind == 'pil' else ''}qwen2_vl.{name}")


def library(folder: Path, kind: str) -> Any:
    """Hugging Face's processor of a folder, built of its parts: its own loading wants torchvision installed."""
    tokens = {f"{name}_token": f"<|{name}_pad|>" for name in ("image", "audio", "video")}
    tokens |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    tokens |= {"audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, extra_special_tokens=tokens if kind == "audio" else {}
    )
    read = json.loads((folder / "preprocessor_config.json").read_text())
    pixels = {key: read[key] for key in ("patch_size", "temporal_patch_size", "merge_size", "size")}
    parts: dict[str, Any] = {
        "image_processor": image_class(kind)(
            **{**pixels, **{k: v for k, v in read.items() if k.startswith(("image_m", "image_s"))}}
        ),
        "tokenizer": tokenizer,
        "chat_template": tokenizer.chat_template,
    }
    if kind == "audio":
        base: Any = transformers.Qwen3OmniMoeProcessor
        parts["video_processor"] = library_class("qwen2_vl.video_processing_qwen2_vl.Qwen2VLVideoProcessor")(**pixels)
        parts["feature_extractor"] = transformers.WhisperFeatureExtractor(feature_size=128)
    else:
        base = transformers.Qwen3VLProcessor
        video = json.loads((folder / "video_preprocessor_config.json").read_text())
        parts["video_processor"] = library_class("qwen3_vl.video_processing_qwen3_vl.Qwen3VLVideoProcessor")(
            **video, cap_pixels_per_frame=False
        )
    unchecked = {"check_argument_for_proper_class": lambda self, name, argument: type(argument)}
    return type(base.__name__, (base,), unchecked)(**parts)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows, models = write_media(folder), write_models(folder)
        print(f"{'':52}{'mmfn':>10}{'in floats':>10}{'library':>10}{'measured':>10}   ratios to the library")
        for name, (kind, file) in rows.items():
            if args.only in name:
                write_record(folder, kind, file)
                print(row(name, (folder, models[kind], kind, file), args.rounds), flush=True)


def calls(folder: Path, model: Path, kind: str, file: str) -> tuple[Callable[[], Any], ...]:
    """What is timed: a batch of one sample, the same in floats, the same by the library, a sample only measured."""
    path = folder / f"{file}.jsonl"
    data = Dataset(path, load_model_processor(str(model)), cache_bytes=0)
    theirs, source = library(model, kind), str(folder / file)
    config = json.loads((model / "config.json").read_text())
    own = family(config["model_type"])
    cfg = own.config_from_hf(config)
    if kind != "audio":
        cfg = replace(cfg, vision=replace(cfg.vision, patch_size=PATCHES["patch_size"]))
    kind = SHOWN.get(kind, kind)
    said = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": QUESTION}]}]
    said.append({"role": "assistant", "content": ANSWER})

    def by_library() -> Any:
        """Its functions that load, its processor, its template."""
        text = theirs.apply_chat_template(said, tokenize=False)
        if kind == "image":
            return theirs(text=text, images=[load_image(source)], return_tensors="pt")
        if kind == "audio":
            return theirs(text=text, audio=[load_audio(source, 16_000, backend="soundfile")], return_tensors="pt")
        sample = theirs.video_processor.sample_frames
        frames, metadata = load_video(
            source, backend="pyav", sample_indices_fn=lambda metadata, **_: sample(metadata, fps=2)
        )
        return theirs(
            text=text, videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
        )

    def pack() -> Batch:
        return own.pack_bytes([data.sample(0)], cfg)

    return pack, lambda: in_floats(pack()), by_library, lambda: data.measure(0)


def write_record(folder: Path, kind: str, file: str) -> None:
    """A file of one conversation."""
    shown = SHOWN.get(kind, kind)
    messages = [{"role": "user", "content": [{"type": shown, shown: file}, {"type": "text", "text": QUESTION}]}]
    messages.append({"role": "assistant", "content": ANSWER})
    (folder / f"{file}.jsonl").write_text(json.dumps({"messages": messages}))


def row(name: str, case: tuple[Path, Path, str, str], rounds: int) -> str:
    """Samples per second by the median of all rounds, in turns."""
    context = multiprocessing.get_context("spawn")
    sides = []
    for column in range(4):
        here, there = context.Pipe()
        process = context.Process(target=answer, args=(there, case, column), daemon=True)
        process.start()
        there.close()
        sides.append((here, process))
    times = [[ask(here, is_last=False) for here, _ in sides] for _ in range(WARM + rounds)][WARM:]
    for here, process in sides:
        ask(here, is_last=True)
        process.join()
    rates = [1 / statistics.median(values) for values in zip(*times, strict=True)]
    ratios = (statistics.median(library / own[i] for *own, library, _ in times) for i in (0, 1))
    columns = "".join(f"{rate:>8.2f}/s" for rate in rates)
    return f"{name:52}{columns}   {' x '.join(f'{ratio:.2f}' for ratio in ratios)} x"


def ask(side: Any, *, is_last: bool) -> float:
    """Seconds of one more call of a side; of none where it is told to end."""
    side.send(is_last)
    seconds: float = 0.0 if is_last else side.recv()
    return seconds


def answer(asked: Any, case: tuple[Path, Path, str, str], column: int) -> None:
    """In a process of its own: seconds of the CPU of a call, what it returns given back, as often as asked."""
    torch.set_num_threads(1)
    with in_place_of_torchvision():
        call = calls(*case)[column]
        while not asked.recv():
            start = time.process_time()
            call()
            asked.send(time.process_time() - start)


if __name__ == "__main__":
    main()
