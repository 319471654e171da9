"""A model's processor: its chat, and how its images and videos become patches. Read from the folder of a checkpoint."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from mmfn.train.data.image import ImageSpec
from mmfn.train.data.template import Chat, make_chat
from mmfn.train.data.tokenizer import load_tokenizer, read_json
from mmfn.train.data.video import VideoSpec


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What turns a conversation into a `Sample`. `video` is None for a checkpoint without a video processor."""

    chat: Chat
    image: ImageSpec
    video: VideoSpec | None = None

    def __post_init__(self) -> None:
        if self.video is None:
            return
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            image, video = getattr(self.image, name), getattr(self.video.pixels, name)
            if image != video:
                raise ValueError(
                    f"{name} is {image} for images but {video} for videos; one vision tower needs one value"
                )


def load_processor(path: str | PathLike[str], template: str = "") -> Processor:
    """The processor in the folder of a Hugging Face checkpoint; `template` (jinja source) overrides its chat template.

    Reads the tokenizer, `preprocessor_config.json` and `video_preprocessor_config.json`, or the sections of
    `processor_config.json` that newer libraries write. Raises ValueError naming the file that is missing or wrong.
    """
    folder = Path(path)
    image = _section(folder, "image_processor", "preprocessor_config.json")
    if image is None:
        raise ValueError(f"folder {str(path)!r} has no preprocessor_config.json; copy it from the original checkpoint")
    video = _section(folder, "video_processor", "video_preprocessor_config.json")
    return Processor(
        chat=make_chat(load_tokenizer(folder), template),
        image=ImageSpec.from_hf(image),
        video=None if video is None else VideoSpec.from_hf(video),
    )


def _section(folder: Path, name: str, file: str) -> dict[str, Any] | None:
    both = folder / "processor_config.json"
    found = read_json(both).get(name) if both.exists() else None
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{name!r} in {str(both)!r} must be an object, got {found!r}")
    if found is None and (folder / file).exists():
        found = read_json(folder / file)
    return found
