"""A model's processor: its chat, and what its media become. Read from the folder of a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from mmfn.batch import IGNORE, Sample
from mmfn.errors import UserError
from mmfn.models import family
from mmfn.models.data import MediaByKind, MediaProcessor
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


def load_processor(path: str | PathLike[str], template: str = "") -> Processor:
    """The processor in the folder of a Hugging Face checkpoint; `template` (jinja source) overrides its chat template.

    Reads config.json, the tokenizer, and the files of the processor as older and newer libraries write them. Raises
    ValueError naming the file that is missing or wrong.
    """
    folder = Path(path)
    config = read_json(folder / "config.json")
    model = family(str(config.get("model_type")))
    sections = {name: section for name, file in FILES.items() if (section := _section(folder, name, file)) is not None}
    for name in model.data.sections:
        if name not in sections:
            raise UserError(f"folder {str(path)!r} has no {FILES[name]}; copy it from the original checkpoint")
    cfg = model.config_from_hf(config)
    return Processor(
        chat=make_chat(load_tokenizer(folder), model.data.chat, lambda tokens_T: model.kinds(tokens_T, cfg), template),
        media=model.data.processor(sections, cfg),
    )


def encode_sample(
    messages: Sequence[Message],
    processor: Processor,
    media: MediaByKind,
    *,
    tools: Sequence[Any] = (),
    is_prompt: bool = False,
    id: str = "",
) -> Sample:
    """A conversation and its media as a `Sample` whose labels are what the assistant wrote.

    `is_prompt` ends it in the header of an answer to be generated, and supervises nothing. Raises ValueError when text
    and media disagree.
    """
    texts = processor.media.texts(media)
    encoded = encode(messages, processor.chat, texts=texts, tools=tools, is_prompt=is_prompt)
    is_label_T = torch.zeros_like(encoded.supervised_T) if is_prompt else encoded.supervised_T
    return Sample(
        tokens_T=encoded.tokens_T,
        labels_T=torch.where(is_label_T, encoded.tokens_T, IGNORE),
        kinds_T=encoded.kinds_T,
        images=tuple(media.get("image", ())),
        videos=tuple(media.get("video", ())),
        audios=tuple(media.get("audio", ())),
        id=id,
    )


def _section(folder: Path, name: str, file: str) -> dict[str, Any] | None:
    both = folder / "processor_config.json"
    section = read_json(both).get(name) if both.exists() else None
    if section is not None and not isinstance(section, dict):
        raise UserError(f"{name!r} in {str(both)!r} must be an object, got {section!r}")
    return read_json(folder / file) if section is None and (folder / file).exists() else section
