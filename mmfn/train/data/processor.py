"""A model's processor: its chat, and what its media become. Read from the folder of a checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import IGNORE, Media, Sample
from mmfn.errors import UserError
from mmfn.models import Family, family
from mmfn.models.data import MediaByKind, MediaProcessor
from mmfn.train.chat_options import PUBLISHED, ChatOptions
from mmfn.train.data.records import Message
from mmfn.train.data.template import Chat, encode, make_chat
from mmfn.train.data.tokenizer import load_tokenizer, read_json

FILES = {  # sections of processor_config.json, and the files that older libraries write in their place
    "image_processor": "preprocessor_config.json",
    "video_processor": "video_preprocessor_config.json",
    "feature_extractor": "preprocessor_config.json",
}


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What turns a conversation into a `Sample`."""

    chat: Chat
    media: MediaProcessor


def load_processor(path: str | PathLike[str], template: str = "", options: ChatOptions = PUBLISHED) -> Processor:
    """The processor in the folder of a Hugging Face checkpoint; `template` (jinja source) overrides its chat template.

    `options`: how chats are rendered and learned, but for their template. Reads config.json, the tokenizer, and the
    files of the processor as older and newer libraries write them. Raises ValueError naming the file that is missing or
    wrong.
    """
    folder = Path(path)
    config = read_json(folder / "config.json")
    model = family(str(config.get("model_type")))
    sections = {name: section for name, file in FILES.items() if (section := _section(folder, name, file)) is not None}
    for name in model.data.sections:
        if name not in sections:
            raise UserError(f"folder {str(path)!r} has no {FILES[name]}; copy it from the original checkpoint")
    cfg = model.config_from_hf(config)
    tokenizer = load_tokenizer(folder)
    return Processor(
        chat=make_chat(tokenizer, model.data.chat, partial(_kinds, model, cfg), template, options),
        media=model.data.processor(sections, cfg),
    )


def _kinds(model: Family, cfg: Any, tokens_T: Tensor) -> Tensor:  # named, so that a process can be sent it
    return model.kinds(tokens_T, cfg)


def settings_texts(folder: str | PathLike[str], media: MediaProcessor) -> dict[str, str]:
    """The files of the processor in a checkpoint's `folder`, by name, changed to say what `media` does; all else stays.

    A section that only older libraries write as a file of its own, or none does yet, becomes such a file.
    """
    both, changed = Path(folder) / "processor_config.json", dict[str, dict[str, Any]]()

    def read(file: Path) -> dict[str, Any]:
        return changed.get(file.name) or (read_json(file) if file.exists() else {})

    for name, values in media.sections().items():
        whole = read(both)
        file = both if name in whole else Path(folder) / FILES[name]
        section: dict[str, Any] = whole[name] if name in whole else read(file)
        rest = {key: value for key, value in section.items() if key not in ("min_pixels", "max_pixels")}
        changed[file.name] = {**whole, name: {**rest, **values}} if file == both else {**rest, **values}
    return {name: json.dumps(values, indent=2) + "\n" for name, values in changed.items()}


def encode_sample(
    messages: Sequence[Message],
    processor: Processor,
    media: MediaByKind,
    *,
    tools: Sequence[Any] = (),
    is_prompt: bool = False,
    only_last: bool = False,
    id: str = "",
) -> Sample:
    """A conversation and its media as a `Sample` whose labels are what is learned (see `template.encode`).

    `is_prompt` ends it in the header of an answer to be generated, and labels nothing; `only_last` labels the last
    answer alone. Raises ValueError when text and media disagree.
    """
    texts = processor.media.texts(media)
    encoded = encode(messages, processor.chat, texts=texts, tools=tools, is_prompt=is_prompt, only_last=only_last)
    return Sample(
        tokens_T=encoded.tokens_T,
        labels_T=torch.where(encoded.supervised_T, encoded.tokens_T, IGNORE),
        kinds_T=encoded.kinds_T,
        images=tuple(media.get("image", ())),
        videos=tuple(media.get("video", ())),
        audios=_sounds(messages, media),
        id=id,
    )


def media_of(sample: Sample) -> MediaByKind:
    """What `encode_sample` was given: the sound of a video is no audio of its own."""
    heard = [video.sound for video in sample.videos]
    audios = [clip for clip in sample.audios if all(clip is not sound for sound in heard)]
    return {"image": sample.images, "video": sample.videos, "audio": audios}


def _sounds(messages: Sequence[Message], media: MediaByKind) -> tuple[Media, ...]:
    """Clips in the order of their tokens: those of videos that are heard stand among the others."""
    audios = media.get("audio", ())
    if all(video.sound is None for video in media.get("video", ())):
        return tuple(audios)
    parts = [part["type"] for m in messages if isinstance(m["content"], list) for part in m["content"]]
    left = {"audio": iter(audios), "video": iter([video.sound for video in media["video"]])}
    return tuple(clip for kind in parts if kind in left if (clip := next(left[kind])) is not None)


def _section(folder: Path, name: str, file: str) -> dict[str, Any] | None:
    both = folder / "processor_config.json"
    section = read_json(both).get(name) if both.exists() else None
    if section is not None and not isinstance(section, dict):
        raise UserError(f"{name!r} in {str(both)!r} must be an object, got {section!r}")
    return read_json(folder / file) if section is None and (folder / file).exists() else section
