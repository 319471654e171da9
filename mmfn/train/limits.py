"""What a file of media may hold: checked by what it says of itself, before anything is decoded."""

import stat
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from mmfn.errors import UserError

PILLOWS_PIXELS = 178_956_970  # above which Pillow itself opens no image; at half of that it warns


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest file that is decoded.

    `image_pixels`: height times width, before resizing. `audio_seconds`: length of a sound. `audio_values`: samples of
    all its channels, 4 bytes each while they are mixed. `audio_rates`: samples per second, lowest and highest.
    """

    image_pixels: int = PILLOWS_PIXELS // 2
    audio_seconds: float = 3600.0
    audio_values: int = 2**29
    audio_rates: tuple[int, int] = (1_000, 768_000)

    def __post_init__(self) -> None:
        if not 0 < self.image_pixels <= PILLOWS_PIXELS:
            raise UserError(f"image_pixels must be in 1 ... {PILLOWS_PIXELS} (Pillow's limit), got {self.image_pixels}")
        if not self.audio_seconds > 0:
            raise UserError(f"audio_seconds must be positive, got {self.audio_seconds}")

    def check_image(self, width: int, height: int) -> None:
        """Raise ValueError for an image of too many pixels."""
        if width * height > self.image_pixels:
            raise UserError(
                f"it has {width} x {height} pixels, more than the {self.image_pixels} of max_image_pixels: make it "
                "smaller or raise the limit"
            )

    def most_samples(self, rate: int, channels: int) -> int:
        """Samples of each channel that a sound may have. Raises ValueError for a rate that is none of sound."""
        low, high = self.audio_rates
        if not low <= rate <= high:
            raise UserError(f"its rate is {rate} Hz but must be in {low} ... {high}: convert it")
        return int(min(self.audio_seconds * rate, self.audio_values // channels))

    def check_sound(self, num_samples: float, rate: int, channels: int) -> None:
        """Raise ValueError for a sound that is too long, of a number of samples of each channel."""
        if num_samples > (most := self.most_samples(rate, channels)):
            raise UserError(
                f"with {channels} channels at {rate} Hz it may last {most / rate:g} s by max_audio_seconds and memory, "
                "but is longer: cut it or raise the limit"
            )


LIMITS = Limits()


def check_regular(source: str | PathLike[str]) -> None:
    """Raise ValueError for a folder, pipe or device, which may never end, and FileNotFoundError for a missing file."""
    if not stat.S_ISREG(Path(source).stat().st_mode):
        raise UserError("it is no regular file")
