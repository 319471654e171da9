"""The media of a record, read or only measured."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfn.batch import Media
from mmfn.errors import MissingPackageError, UserError
from mmfn.models.data import MediaByKind, MediaProcessor
from mmfn.train.data.audio import decode_audio, resample
from mmfn.train.data.entries import show
from mmfn.train.data.image import decode_image, image_size
from mmfn.train.data.records import Record
from mmfn.train.data.video import Source, decode_frames, decode_video
from mmfn.train.limits import LIMITS, Limits

Find = Callable[[str], Path | bytes]
"""What the name of a medium stands for: a file, or the bytes stored beside the entry. Raises ValueError for nothing."""
Settings = Mapping[str, Any]


class MediaReader:
    """Reads what records name, as a model's processor takes it. Raises ValueError, one sentence, for all it cannot."""

    def __init__(
        self,
        media: MediaProcessor,
        *,
        limits: Limits = LIMITS,
        audio_rate: int | None = None,
        is_heard: bool = False,
    ) -> None:
        """`audio_rate`: samples per second that sound passes through; None: the model's own. `is_heard`: the sound of
        videos is read along with them. Raises ValueError where one of the two is set and the model hears nothing.
        """
        self.media, self.limits, self.audio_rate, self.is_heard = media, limits, audio_rate, is_heard
        for name, value in (("use_audio_in_video", is_heard), ("audio_sampling_rate", audio_rate)):
            if value:
                try:
                    media.sound_rate()
                except UserError as error:
                    raise UserError(f"data.{name} is {value}, but {error}, or leave the setting out") from None

    def read(self, record: Record, find: Find) -> MediaByKind:
        """What the record's media become, in their order."""
        return self._all(record, find, is_measured=False)

    def measure(self, record: Record, find: Find) -> MediaByKind:
        """The same with `inputs_UF` on the device "meta": grids, times and sizes alone, and nothing is decoded that the
        headers of the files tell."""
        return self._all(record, find, is_measured=True)

    def _all(self, record: Record, find: Find, *, is_measured: bool) -> MediaByKind:
        readers = {"image": self._image, "video": self._video, "audio": self._audio}
        names = {"image": record.images, "video": record.videos, "audio": record.audios}
        media: dict[str, list[Media]] = {kind: [] for kind in readers}
        for kind, reader in readers.items():
            for place, name in enumerate(names[kind]):
                each = name if isinstance(name, tuple) else (name,)
                with _named(kind, each[0]):
                    sources = [find(one) for one in each]
                    source = sources if isinstance(name, tuple) else sources[0]
                    media[kind].append(reader(source, record.settings.get((kind, place), {}), is_measured))
        return media

    def _image(self, source: Any, settings: Settings, is_measured: bool) -> Media:
        media = self.media.with_settings("image", settings) if settings else self.media
        if settings or is_measured:
            shape = image_size(source, self.limits)
            measured = media.image(torch.empty(3, *shape, dtype=torch.uint8, device="meta"))
            self.limits.check_patches(measured.inputs_UF.numel())
            if is_measured:
                return measured
        return media.image(decode_image(source, self.limits))

    def _video(self, source: Any, settings: Settings, is_measured: bool) -> Media:
        budget, is_heard = dict(settings), settings.get("use_audio_in_video", self.is_heard)
        span_s = budget.pop("video_start", 0.0), budget.pop("video_end", float("inf"))
        budget.pop("use_audio_in_video", None)
        media = self.media.with_settings("video", budget) if budget else self.media
        if isinstance(source, list):
            for name in ("video_start", "video_end", "nframes", "min_frames", "max_frames"):
                if name in settings:
                    raise UserError(f"all frames of a list are taken, so that {name} has no meaning; list fewer")
            footage = decode_frames(source, media.sampling(), self.limits, is_measured=is_measured)
        else:
            footage = decode_video(
                source, media.sampling(), self.limits, start_s=span_s[0], end_s=span_s[1], is_measured=is_measured
            )
        video = media.video(footage.frames_u8, footage.times, footage.rate, footage.shape)
        return replace(video, sound=self._sound(source, span_s, is_measured)) if is_heard else video

    def _sound(self, source: Any, span_s: tuple[float, float], is_measured: bool) -> Media:
        """Of a video."""
        if isinstance(source, list):
            raise UserError(
                "use_audio_in_video is on, but a list of frames has no sound; set it to false for this video"
            )
        try:
            wave_S, rate = self._wave(source, is_measured), self.media.sound_rate()
            first, last = (int(min(second * rate, len(wave_S))) for second in span_s)
            return self.media.audio(wave_S[first:last])
        except MissingPackageError:
            raise
        except UserError as error:
            raise UserError(f"use_audio_in_video is on, but {error}; or set it to false for this video") from error

    def _audio(self, source: Any, settings: Settings, is_measured: bool) -> Media:
        return self.media.audio(self._wave(source, is_measured))

    def _wave(self, source: Source, is_measured: bool) -> Tensor:
        rate = self.media.sound_rate()
        through = self.audio_rate or rate
        wave_S = decode_audio(source, through, self.limits, is_measured=is_measured)
        return wave_S if through == rate else resample(wave_S, through, rate)


@contextmanager
def _named(kind: str, name: str) -> Iterator[None]:
    """Errors say which medium they are about."""
    try:
        yield
    except MissingPackageError:
        raise
    except UserError as error:
        if show(name).strip("'\"") in str(error):
            raise
        raise UserError(f"{kind} {show(name)}: {error}") from error
