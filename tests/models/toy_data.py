"""The data side of the toy family: columns of an image, steps of sound, and words that stand for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from mmfn.batch import Media
from mmfn.models.data import DataSide, Fact, MediaByKind, Sampling
from mmfn.models.data.chat import ChatFormat, MediaText, TextsByKind
from mmfn.models.data.inputs import integers, pair

INPUTS = {"image": ("columns", "column_counts"), "audio": ("steps", "step_counts")}


@dataclass(frozen=True, kw_only=True)
class ToyProcessor:
    """A `MediaProcessor`; `width`: columns of every image."""

    width: int

    def image(self, image_u8: Tensor) -> Media:
        """The mean colour of every column; two make a unit."""
        if image_u8.shape[2] != self.width:
            raise ValueError(f"an image must be {self.width} pixels wide, got {image_u8.shape[2]}")
        return Media(inputs_UF=image_u8.float().mean(1).T.contiguous(), grid=(self.width, 1, 1))

    def sampling(self) -> Sampling:
        """It takes no videos."""
        raise ValueError("the toy takes no videos")

    def video(self, frames_u8: Tensor, times: Sequence[float], rate: float) -> Media:
        """It takes no videos."""
        raise ValueError("the toy takes no videos")

    def sound_rate(self) -> int:
        """As files of old telephones have it."""
        return 8000

    def audio(self, wave_S: Tensor) -> Media:
        """A step every five samples, an even number of them."""
        return Media(inputs_UF=wave_S.view(-1, 5), grid=(wave_S.numel() // 5, 1, 1))

    def texts(self, media: MediaByKind) -> TextsByKind:
        """A picture is its word; sound stands between marks of its own."""
        words = {"image": "<picture>", "audio": "begin <sound> end"}
        return {
            kind: [MediaText(text=words[kind], counts=(num_tokens(kind, one, None),)) for one in items]
            for kind, items in media.items()
        }


def processor(sections: Mapping[str, Mapping[str, Any]], cfg: Any) -> ToyProcessor:
    """Of the section `image_processor`."""
    return ToyProcessor(width=sections["image_processor"]["width"])


def facts(cfg: Any, processor: ToyProcessor) -> list[Fact]:
    """Widths are even."""
    return [Fact(name="width % 2", config=0, processor=processor.width % 2)]


def num_tokens(kind: str, media: Media, cfg: Any) -> int:
    """A feature a unit of an image, two of sound; two columns or steps are a unit."""
    return -(-prod(media.grid) // 2) * (2 if kind == "audio" else 1)


def media_from_hf(inputs: Mapping[str, Tensor], cfg: Any) -> MediaByKind:
    """Media end to end under the first key, their lengths under the second."""
    media = {}
    for kind, keys in INPUTS.items():
        both = pair(inputs, *keys)
        lengths = [] if both is None else integers(keys[1], both[1]).tolist()
        parts = [] if both is None else both[0].split(lengths)
        media[kind] = [Media(inputs_UF=part, grid=(len(part), 1, 1)) for part in parts]
    return media


SIDE = DataSide(
    chat=ChatFormat(
        placeholders={"image": "<picture>", "audio": "<sound>"},
        tokens={"picture_id": "<picture>", "sound_id": "<sound>"},
        templates=(),
    ),
    sections=("image_processor",),
    processor=processor,
    facts=facts,
    input_keys=tuple(key for keys in INPUTS.values() for key in keys),
    media_from_hf=media_from_hf,
    num_tokens=num_tokens,
)
