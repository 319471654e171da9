"""`Dataset`: conversations with media on disk -> `Sample`s.

`sample(i)` is a function of the file's entry `i` alone: no randomness, no order, so any worker may compute any sample.
"""

import threading
from os import PathLike
from pathlib import Path

import torch

from mmfn.batch import IGNORE, Media, Sample
from mmfn.train.data.image import decode_image, preprocess_image
from mmfn.train.data.processor import Processor
from mmfn.train.data.records import Message, Record, count_media, plain_text, read_records
from mmfn.train.data.template import Encoded, VideoText, encode
from mmfn.train.data.video import decode_frames, decode_video, group_times, preprocess_video


class Dataset:
    """The samples of one JSON or JSONL file. `records[i]` is entry i as stored."""

    def __init__(
        self,
        path: str | PathLike[str],
        processor: Processor,
        *,
        media_root: str | PathLike[str] | None = None,
        max_tokens: int | None = None,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        """Read and check the whole file (media are opened when their sample is asked for).

        `media_root`: folder inside which all media paths must lie, by default the file's own. `max_tokens`: longest
        sample accepted. `cache_bytes`: finished samples kept in memory, at most; 0 keeps none. Raises ValueError naming
        the file and entry.
        """
        self.path = Path(path)
        self.records = read_records(self.path)
        self.processor = processor
        self.max_tokens = max_tokens
        self.media_root = Path(media_root if media_root is not None else self.path.parent).resolve()
        self._cache: dict[int, tuple[Sample, tuple[VideoText, ...]]] = {}
        self._cache_room = cache_bytes
        self._lock = threading.Lock()
        for index, record in enumerate(self.records):
            for name in _paths(record):
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise ValueError(f"dataset {str(path)!r}, entry {index}: {self._outside(name)}")

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int) -> Sample:
        """Entry `index` as a `Sample` whose labels are what the assistant wrote.

        Raises ValueError with the sample's id when a medium does not decode or lies outside the media root, when text
        and media disagree, or when the sample is longer than `max_tokens` (it is never cut).
        """
        return self._load(index)[0]

    def prompt(self, index: int) -> tuple[Sample, str]:
        """(the conversation before the last assistant turn, ending in the header of an answer; that turn's text).

        No label is supervised. Raises ValueError as `sample` does, and when the entry has no assistant turn.
        """
        record = self.records[index]
        turns = [place for place, message in enumerate(record.messages) if message["role"] == "assistant"]
        if not turns or turns[-1] == 0:
            raise ValueError(
                f"sample {record.id!r} of {str(self.path)!r} has no assistant turn after a prompt; give it one to "
                "compare with"
            )
        before = record.messages[: turns[-1]]
        full, texts = self._load(index)
        images = full.images[: count_media(before, "image")]
        num_videos = count_media(before, "video")
        encoded = self._encode(record, before, images, texts[:num_videos], is_prompt=True)
        sample = Sample(
            tokens_T=encoded.tokens_T,
            labels_T=torch.full_like(encoded.tokens_T, IGNORE),
            kinds_T=encoded.kinds_T,
            images=images,
            videos=full.videos[:num_videos],
            id=record.id,
        )
        return sample, plain_text(record.messages[turns[-1]])

    def _load(self, index: int) -> tuple[Sample, tuple[VideoText, ...]]:
        if index in self._cache:
            return self._cache[index]
        record = self.records[index]
        try:
            images = tuple(self._image(name) for name in record.images)
            videos = tuple(self._video(name) for name in record.videos)
        except ValueError as error:
            raise ValueError(f"sample {record.id!r} of {str(self.path)!r}: {error}") from error
        texts = tuple(text for _, text in videos)
        encoded = self._encode(record, record.messages, images, texts)
        num_tokens = encoded.tokens_T.numel()
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            raise ValueError(
                f"sample {record.id!r} of {str(self.path)!r} has {num_tokens} tokens but max_tokens is "
                f"{self.max_tokens}; raise max_tokens, shorten the sample or lower the pixel budget of the processor"
            )
        sample = Sample(
            tokens_T=encoded.tokens_T,
            labels_T=torch.where(encoded.supervised_T, encoded.tokens_T, IGNORE),
            kinds_T=encoded.kinds_T,
            images=images,
            videos=tuple(media for media, _ in videos),
            id=record.id,
        )
        self._keep(index, sample, texts)
        return sample, texts

    def _encode(
        self,
        record: Record,
        messages: tuple[Message, ...],
        images: tuple[Media, ...],
        videos: tuple[VideoText, ...],
        *,
        is_prompt: bool = False,
    ) -> Encoded:
        counts = [_num_tokens(media, self.processor.image.merge_size) for media in images]
        chat, tools = self.processor.chat, record.tools
        try:
            return encode(messages, chat, images=counts, videos=videos, tools=tools, is_prompt=is_prompt)
        except ValueError as error:
            raise ValueError(f"sample {record.id!r} of {str(self.path)!r}: {error}") from error

    def _image(self, name: str) -> Media:
        image_u8 = decode_image(self._resolve(name))
        try:
            return preprocess_image(image_u8, self.processor.image)
        except ValueError as error:
            raise ValueError(f"image {name!r}: {error}") from error

    def _video(self, name: str | tuple[str, ...]) -> tuple[Media, VideoText]:
        spec = self.processor.video
        if spec is None:
            raise ValueError("the model's folder has no video_preprocessor_config.json; add it or remove the videos")
        if isinstance(name, str):
            frames, times = decode_video(self._resolve(name), spec)
        else:
            frames, times = decode_frames([self._resolve(frame) for frame in name], spec)
        media = preprocess_video(frames, spec.pixels)
        per_group = _num_tokens(media, spec.pixels.merge_size) // media.grid[0]
        groups = group_times(times, spec.pixels.temporal_patch_size)
        return media, VideoText(times=tuple(groups), tokens_per_group=per_group)

    def _resolve(self, name: str) -> Path:
        try:
            path = (self.media_root / name).resolve()  # follows links, so that a link cannot lead outside either
        except (RuntimeError, OSError) as error:  # a loop of links: RuntimeError up to Python 3.12, then OSError
            raise ValueError(f"media path {name!r} leads nowhere ({error}); replace the link") from error
        if not path.is_relative_to(self.media_root):
            raise ValueError(self._outside(name))
        return path

    def _outside(self, name: str) -> str:
        return (
            f"media path {name!r} leaves the media root {str(self.media_root)!r}; use a relative path inside it or set "
            "media_root"
        )

    def _keep(self, index: int, sample: Sample, texts: tuple[VideoText, ...]) -> None:
        """Keep until full, never evict: under a random order each epoch, a fixed share of hits beats none."""
        tensors = [sample.tokens_T, sample.labels_T, sample.kinds_T]
        tensors += [media.inputs_UF for media in (*sample.images, *sample.videos)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        with self._lock:
            if size <= self._cache_room and index not in self._cache:
                self._cache_room -= size
                self._cache[index] = (sample, texts)


def _num_tokens(media: Media, merge_size: int) -> int:
    return media.inputs_UF.shape[0] // merge_size**2


def _paths(record: Record) -> list[str]:
    videos = [(name,) if isinstance(name, str) else name for name in record.videos]
    return [*record.images, *(frame for frames in videos for frame in frames)]
