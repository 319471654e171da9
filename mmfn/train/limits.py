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

    `image_pixels`: height times width, before resizing. `image_values`: of what the model reads of one, 4 bytes each;
    settings of a single image may ask for any size. `audio_seconds`: length of a sound. `audio_values`: samples of
    all its channels, 4 bytes each while they are mixed. `audio_rates`: samples per second, lowest and highest.
    `video_seconds`: length of a video, `video_packets` of them at most. `video_values`: 3 for each pixel of the frames
    that are read of one, as large as the model takes them: a byte each, and 4 behind it.
    """

    image_pixels: int = PILLOWS_PIXELS // 2
    image_values: int = 2**29
    audio_seconds: float = 3600.0
    audio_values: int = 2**29
    audio_rates: tuple[int, int] = (1_000, 768_000)
    video_seconds: float = 14_400.0
    video_packets: int = 2**21
    video_values: int = 2**31

    def __post_init__(self) -> None:
        if not 0 < self.image_pixels <= PILLOWS_PIXELS:
            raise UserError(f"image_pixels must be in 1 ... {PILLOWS_PIXELS} (Pillow's limit), got {self.image_pixels}")
        for name in ("audio_seconds", "video_seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")

    def check_image(self, width: int, height: int) -> None:
        """Raise ValueError for an image of too many pixels."""
        if width * height > self.image_pixels:
            raise UserError(
                f"it has {width} x {height} pixels, more than the {self.image_pixels} of max_image_pixels: make it "
                "smaller or raise the limit"
            )

    def check_patches(self, num_values: int) -> None:
        """Raise ValueError for an image that is to be resized to too many."""
        if num_values > self.image_values:
            raise UserError(
                f"its patches have {num_values} values, more than {self.image_values}; lower min_pixels, max_pixels or "
                "resized_height and resized_width"
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

    def check_video(self, seconds: float) -> None:
        """Raise ValueError for a video that is too long."""
        if seconds > self.video_seconds:
            raise UserError(
                f"it lasts {seconds:g} s, more than the {self.video_seconds:g} of max_video_seconds: cut it or raise "
                "the limit"
            )

    def check_packets(self, num_packets: int) -> None:
        """Raise ValueError for a video of too many frames to list."""
        if num_packets > self.video_packets:
            raise UserError(f"it has more than {self.video_packets} frames: cut it")

    def check_frames(self, num_frames: int, height: int, width: int) -> None:
        """Raise ValueError where the frames that are read of a video take too much memory."""
        if 3 * num_frames * height * width > self.video_values:
            raise UserError(
                f"{num_frames} frames of {width} x {height} pixels are read of it, more than {self.video_values} "
                "values: lower video_maxlen, video_fps or video_max_pixels"
            )


LIMITS = Limits()


def check_regular(source: str | PathLike[str] | bytes) -> None:
    """Raise ValueError for a folder, pipe or device, which may never end, and FileNotFoundError for a missing file."""
    if not isinstance(source, bytes) and not stat.S_ISREG(Path(source).stat().st_mode):
        raise UserError("it is no regular file")
