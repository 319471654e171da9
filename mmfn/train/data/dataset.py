"""`Dataset`: conversations with media on disk -> `Sample`s.

`sample(i)` is a function of the file's entry `i` alone: no randomness, no order, so any worker may compute any sample.
"""

import threading
from os import PathLike
from pathlib import Path

from mmfn.batch import Media, Sample
from mmfn.errors import UserError
from mmfn.models.data import MediaByKind
from mmfn.train.data.audio import decode_audio
from mmfn.train.data.image import decode_image
from mmfn.train.data.processor import Processor, encode_sample
from mmfn.train.data.records import Message, Record, count_media, plain_text, read_records
from mmfn.train.data.video import decode_frames, decode_video
from mmfn.train.dialect import Dialect
from mmfn.train.limits import LIMITS, Limits


class Dataset:
    """The samples of one JSON or JSONL file. `records[i]` is entry i as stored."""

    def __init__(
        self,
        path: str | PathLike[str],
        processor: Processor,
        *,
        media_root: str | PathLike[str] | None = None,
        max_tokens: int | None = None,
        max_samples: int | None = None,
        dialect: Dialect | None = None,
        cache_bytes: int = 256 * 2**20,
        limits: Limits = LIMITS,
    ) -> None:
        """Read and check the whole file (media are opened when their sample is asked for).

        `media_root`: folder inside which all media paths must lie, by default the file's own. `max_tokens`: longest
        sample accepted. `max_samples`: how many entries are read, from the first on. `dialect`: the format they are in,
        by default found out. `cache_bytes`: finished samples kept in memory, at most; 0 keeps none. `limits`: of the
        media files that are decoded. Raises ValueError naming the file and entry.
        """
        self.path = Path(path)
        self.records = read_records(self.path, dialect, max_samples)
        self.processor = processor
        self.max_tokens = max_tokens
        self.media_root = Path(media_root if media_root is not None else self.path.parent).resolve()
        self.limits = limits
        self._cache: dict[int, Sample] = {}
        self._cache_room = cache_bytes
        self._lock = threading.Lock()
        for index, record in enumerate(self.records):
            for name in _paths(record):
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise UserError(f"dataset {str(path)!r}, entry {index}: {self._outside(name)}")

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int) -> Sample:
        """Entry `index` as a `Sample` whose labels are what the assistant wrote.

        Raises ValueError with the sample's id when a medium does not decode or lies outside the media root, when text
        and media disagree, or when the sample is longer than `max_tokens` (it is never cut).
        """
        sample = self._cache.get(index)
        if sample is None:
            sample = self._load(self.records[index])
            self._keep(index, sample)
        return sample

    def prompt(self, index: int) -> tuple[Sample, str]:
        """(the conversation before the last assistant turn, ending in the header of an answer; that turn's text).

        No label is supervised. Raises ValueError as `sample` does, and when the entry has no assistant turn.
        """
        record = self.records[index]
        turns = [place for place, message in enumerate(record.messages) if message["role"] == "assistant"]
        if not turns or turns[-1] == 0:
            raise UserError(
                f"sample {record.id!r} of {str(self.path)!r} has no assistant turn after a prompt; give it one to "
                "compare with"
            )
        before = record.messages[: turns[-1]]
        full = self.sample(index)
        media = {
            "image": full.images[: count_media(before, "image")],
            "video": full.videos[: count_media(before, "video")],
            "audio": full.audios[: count_media(before, "audio")],
        }
        return self._encode(record, before, media, is_prompt=True), plain_text(record.messages[turns[-1]])

    def _load(self, record: Record) -> Sample:
        try:
            media = {
                "image": [self._image(name) for name in record.images],
                "video": [self._video(name) for name in record.videos],
                "audio": [self._audio(name) for name in record.audios],
            }
        except UserError as error:
            raise UserError(f"sample {record.id!r} of {str(self.path)!r}: {error}") from error
        sample = self._encode(record, record.messages, media)
        num_tokens = sample.tokens_T.numel()
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            raise UserError(
                f"sample {record.id!r} of {str(self.path)!r} has {num_tokens} tokens but max_tokens is "
                f"{self.max_tokens}; raise max_tokens, shorten the sample or lower the pixel budget of the processor"
            )
        return sample

    def _encode(
        self, record: Record, messages: tuple[Message, ...], media: MediaByKind, *, is_prompt: bool = False
    ) -> Sample:
        tools = record.tools
        try:
            return encode_sample(messages, self.processor, media, tools=tools, is_prompt=is_prompt, id=record.id)
        except UserError as error:
            raise UserError(f"sample {record.id!r} of {str(self.path)!r}: {error}") from error

    def _image(self, name: str) -> Media:
        image_u8 = decode_image(self._resolve(name), self.limits)
        try:
            return self.processor.media.image(image_u8)
        except UserError as error:
            raise UserError(f"image {name!r}: {error}") from error

    def _video(self, name: str | tuple[str, ...]) -> Media:
        sampling = self.processor.media.sampling()
        if isinstance(name, str):
            frames, times, rate = decode_video(self._resolve(name), sampling)
        else:
            rate = sampling.fps
            frames, times = decode_frames([self._resolve(frame) for frame in name], rate, self.limits)
        return self.processor.media.video(frames, times, rate)

    def _audio(self, name: str) -> Media:
        media = self.processor.media
        wave_S = decode_audio(self._resolve(name), media.sound_rate(), self.limits)
        try:
            return media.audio(wave_S)
        except UserError as error:
            raise UserError(f"sound {name!r}: {error}") from error

    def _resolve(self, name: str) -> Path:
        try:
            path = (self.media_root / name).resolve()  # follows links, so that a link cannot lead outside either
        except (RuntimeError, OSError) as error:  # a loop of links: RuntimeError up to Python 3.12, then OSError
            raise UserError(f"media path {name!r} leads nowhere ({error}); replace the link") from error
        if not path.is_relative_to(self.media_root):
            raise UserError(self._outside(name))
        return path

    def _outside(self, name: str) -> str:
        return (
            f"media path {name!r} leaves the media root {str(self.media_root)!r}; use a relative path inside it or set "
            "media_root"
        )

    def _keep(self, index: int, sample: Sample) -> None:
        """Keep until full, never evict: under a random order each epoch, a fixed share of hits beats none."""
        tensors = [sample.tokens_T, sample.labels_T, sample.kinds_T]
        tensors += [media.inputs_UF for media in (*sample.images, *sample.videos, *sample.audios)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        with self._lock:
            if size <= self._cache_room and index not in self._cache:
                self._cache_room -= size
                self._cache[index] = sample


def _paths(record: Record) -> list[str]:
    videos = [(name,) if isinstance(name, str) else name for name in record.videos]
    return [*record.images, *record.audios, *(frame for frames in videos for frame in frames)]
