"""The data side of the families: what their processors do, as pure functions of tensors.

Files are decoded, conversations rendered and tokenized by general code (`mmfn.train.data`), which asks the family what
a medium becomes: the inputs of its encoder, and the text that stands for it. `DataSide` is all that it asks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from mmfn.batch import Media
from mmfn.models.data.chat import ChatFormat, TextsByKind

SETTINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "image": ("min_pixels", "max_pixels", "resized_height", "resized_width"),
        "video": (
            *("min_pixels", "max_pixels", "resized_height", "resized_width"),
            *("fps", "nframes", "min_frames", "max_frames"),
        ),
        "audio": (),
    }
)
"""What may be set of one medium, by its kind; the names are those of qwen-vl-utils."""
Settings = Mapping[str, float]
MediaByKind = Mapping[str, Sequence[Media]]  # "image", "video", "audio" -> media in the order of their placeholders


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which frames of a video file are read.

    `select(num_frames, rate)`: their indices, ascending, of a file with so many frames at `rate` per second. `fps`: the
    rate of a video that comes as a list of frames, all of which are taken. `size(num_frames, height, width)`: what so
    many frames of that height and width are resized to, (height, width), which a reader may do frame by frame.
    """

    fps: float
    select: Callable[[int, float], list[int]]
    size: Callable[[int, int, int], tuple[int, int]]


class MediaProcessor(Protocol):
    """How decoded media become what the encoders read: the settings of one checkpoint.

    All of it raises ValueError, one sentence, for media that the model cannot take. Of tensors on the device "meta" it
    gives what those of the same shapes with values would become, on "meta": their size, without the work.
    """

    def with_settings(self, kind: str, settings: Settings) -> "MediaProcessor":
        """The same, but for some settings of media of a kind ("image", "video"), by the names in `SETTINGS`.

        Raises ValueError for one that means nothing to the model, and for values out of range.
        """

    def sections(self) -> Mapping[str, Mapping[str, Any]]:
        """Its settings as the sections of a processor's files have them, by the names of `DataSide.sections`."""

    def image(self, image_u8: Tensor) -> Media:
        """Of uint8[3, H, W]."""

    def sampling(self) -> Sampling:
        """Raises ValueError where the checkpoint has no settings for videos."""

    def video(
        self, frames_u8: Tensor, times: Sequence[float], rate: float, shape: tuple[int, int] | None = None
    ) -> Media:
        """Of uint8[T, 3, H, W], the times of the frames in seconds, and how many there are per second of the video.

        `shape`: height and width that the frames had before they were resized as `Sampling.size` says; None: they were
        not.
        """

    def sound_rate(self) -> int:
        """Samples per second that `audio` takes. Raises ValueError where the model hears nothing."""

    def audio(self, wave_S: Tensor) -> Media:
        """Of float32[S], values in [-1, 1], `sound_rate` samples per second."""

    def texts(self, media: MediaByKind) -> TextsByKind:
        """What is written for the media of one sample."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A value that config.json and a file of the processor, the `source`, both have. `remedy`: what to do if not."""

    name: str
    config: Any
    processor: Any
    source: str = "preprocessor_config.json"
    remedy: str = "use the two files of one model"


@dataclass(frozen=True, kw_only=True)
class DataSide:
    """What a family says of its data: pure functions, and values that general code works with.

    A section is a part of a processor's files, by its name in `processor_config.json` ("image_processor", ...).
    """

    chat: ChatFormat
    sections: tuple[str, ...]  # those that a checkpoint must have
    processor: Callable[[Mapping[str, Mapping[str, Any]], Any], MediaProcessor]  # (all sections there are, cfg)
    facts: Callable[[Any, Any], Sequence[Fact]]  # (cfg, processor) -> what must agree between the two
    input_keys: tuple[str, ...]  # under which Hugging Face's processor of the family returns media
    media_from_hf: Callable[[Mapping[str, Tensor], Any], MediaByKind]  # (inputs by those keys, cfg)
    num_tokens: Callable[[str, Media, Any], int]  # (kind, media, cfg) -> tokens that stand for it
