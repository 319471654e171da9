"""`Dataset`: conversations with media on disk -> `Sample`s.

`sample(i)` is a function of row `i` alone: no randomness, no order, so any worker may compute any sample.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from mmfn.batch import Sample
from mmfn.errors import MissingPackageError, UserError
from mmfn.models.data import MediaByKind
from mmfn.train.data.bad import BadSample
from mmfn.train.data.media import MediaReader
from mmfn.train.data.processor import Processor, encode_sample, media_of
from mmfn.train.data.records import Message, Record, RecordChain, Records, count_media, plain_text
from mmfn.train.data.sources import media_folder, open_source
from mmfn.train.data.sources.files import find_medium
from mmfn.train.data.sources.mixing import Epochs, Mixture, Order
from mmfn.train.dialect import Dialect
from mmfn.train.limits import LIMITS, Limits


@dataclass(frozen=True, kw_only=True)
class Subset:
    """One of the data sets that a `Dataset` is made of.

    `root`: folder inside which all media paths must lie, by default the one its files are in. `dialect`: the format its
    entries are in, by default found out. `max_samples`: how many of them are used, from the first on. `weight`: its
    share of the samples; all of a `Dataset` have one, or none has.
    """

    path: str | PathLike[str]
    root: str | PathLike[str] | None = None
    dialect: Dialect = field(default_factory=Dialect)
    max_samples: int | None = None
    weight: float | None = None


class Dataset:
    """The samples of one data set or several, one after the other. `records[i]` is row i as stored."""

    def __init__(
        self,
        data: str | PathLike[str] | Sequence[Subset],
        processor: Processor,
        *,
        media_root: str | PathLike[str] | None = None,
        max_tokens: int | None = None,
        max_samples: int | None = None,
        dialect: Dialect | None = None,
        cache_bytes: int = 256 * 2**20,
        limits: Limits = LIMITS,
        audio_rate: int | None = None,
        is_heard: bool = False,
        index_folder: str | PathLike[str] | None = None,
    ) -> None:
        """Open the files; entries are read and checked, and media opened, when their sample is asked for.

        `data`: a path, of which `media_root`, `max_samples` and `dialect` say what a `Subset` would, or subsets.
        `max_tokens`: longest sample accepted. `cache_bytes`: finished samples kept in memory, at most; 0 keeps none.
        `limits`, `audio_rate`, `is_heard`: how media are read, see `MediaReader`. `index_folder`: where the indexes of
        large files lie, by default beside them. Raises ValueError naming the file that cannot be read or is empty.
        """
        if isinstance(data, str | PathLike):
            data = [Subset(path=data, root=media_root, max_samples=max_samples, dialect=dialect or Dialect())]
        self.subsets = tuple(data)
        self.processor, self.max_tokens = processor, max_tokens
        self.reader = MediaReader(processor.media, limits=limits, audio_rate=audio_rate, is_heard=is_heard)
        sources = [open_source(subset.path, index_folder) for subset in self.subsets]
        self.records = RecordChain(
            [Records(source, one.dialect, one.max_samples) for source, one in zip(sources, self.subsets, strict=True)]
        )
        for root in (one.root for one in self.subsets if one.root is not None):
            if not Path(root).is_dir():
                raise UserError(f"data.root {str(root)!r} is no folder; give the one that paths of media begin in")
        self._roots = [Path(one.root or media_folder(one.path)).resolve() for one in self.subsets]
        self._cache: dict[int, Sample] = {}
        self._cache_room = cache_bytes
        self._lock, self._last = threading.Lock(), threading.local()

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of the content of each file."""
        return tuple(part.source.fingerprint for part in self.records.parts)

    def __getstate__(self) -> dict[str, Any]:
        """A process that it is sent to begins with an empty cache and a lock of its own."""
        return {**self.__dict__, "_cache": {}, "_lock": None, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        self.__dict__.update(state, _lock=threading.Lock(), _last=threading.local())

    def __len__(self) -> int:
        return len(self.records)

    def order(self, seed: int) -> Order:
        """Which row stands at which place of the order of data: epochs of all rows, or subsets by their weights."""
        weights = [subset.weight for subset in self.subsets if subset.weight is not None]
        return (
            Mixture([len(part) for part in self.records.parts], weights, seed) if weights else Epochs(len(self), seed)
        )

    def place(self, index: int) -> str:
        """Where row `index` is stored, "'train.jsonl', line 17"."""
        part, row = self.records.locate(index)
        return self.records.parts[part].source.place(row)

    def find_medium(self, index: int, name: str) -> Path | bytes:
        """What a path in row `index` names: a file inside the media root, or the bytes that its data set stores.

        Raises ValueError for a path that leaves the root.
        """
        part, row = self.records.locate(index)
        return find_medium(self.records.parts[part].source, row, name, self._roots[part])

    def sample(self, index: int) -> Sample:
        """Row `index` as a `Sample` whose labels are what the assistant wrote.

        Raises BadSample when the entry is no conversation, when a medium does not decode or lies outside the media
        root, when text and media disagree, or when the sample is longer than `max_tokens` (it is never cut).
        """
        sample = self._cache.get(index)
        if sample is None:
            held, sample = getattr(self._last, "sample", (-1, None))
            if held != index or sample is None:
                sample = self._load(index)
                self._keep(index, sample)
                self._last.sample = index, sample  # of this thread, which asks for its parts next
        return sample

    def measure(self, index: int) -> Sample:
        """The same sample, whose `inputs_UF` may lie on the device "meta": only their shapes are of use.

        Files are decoded where their headers do not tell. Raises BadSample as `sample` does, but for what only decoding
        finds out.
        """
        return self._cache.get(index) or self._load(index, is_measured=True)

    def beginnings(self, index: int, *, is_measured: bool) -> Iterator[Sample]:
        """Shorter conversations from the beginning of row `index`, the longest first, each up to the end of an answer.

        `is_measured`: of what `measure` gives. Raises BadSample as `sample` does.
        """
        record, full = self.records[index], self.measure(index) if is_measured else self.sample(index)
        for end in range(len(record.messages) - 1, 0, -1):
            if record.messages[end - 1]["role"] == "assistant":
                messages = record.messages[:end]
                try:
                    yield self._encode(record, messages, _media_of(full, messages))
                except UserError as error:
                    raise BadSample(record.id, self.place(index), str(error)) from error

    def prompt(self, index: int) -> tuple[Sample, str]:
        """(the conversation before the last assistant turn, ending in the header of an answer; that turn's text).

        No label is supervised. Raises BadSample as `sample` does, and when the entry has no assistant turn.
        """
        record, last = self._last_answer(index)
        return self._part(index, last, is_prompt=True), plain_text(record.messages[last])

    def question(self, index: int) -> Sample:
        """The conversation up to the header of an answer, without the one it may end in; nothing is labelled.

        Raises BadSample as `sample` does.
        """
        messages = self.records[index].messages
        return self._part(index, len(messages) - (messages[-1]["role"] == "assistant"), is_prompt=True)

    def answer(self, index: int) -> Sample:
        """The conversation up to the end of its last answer, which alone is labelled, whatever is learned of it.

        Raises BadSample as `prompt` does.
        """
        return self._part(index, self._last_answer(index)[1] + 1, only_last=True)

    def _last_answer(self, index: int) -> tuple[Record, int]:
        record = self.records[index]
        turns = [place for place, message in enumerate(record.messages) if message["role"] == "assistant"]
        if not turns or turns[-1] == 0:
            raise BadSample(
                record.id, self.place(index), "it has no assistant turn after a prompt; give it one to compare with"
            )
        return record, turns[-1]

    def _part(self, index: int, num_messages: int, **parts: bool) -> Sample:
        """The first messages of an entry, with their media; `parts` as of `encode_sample`."""
        record = self.records[index]
        messages = record.messages[:num_messages]
        try:
            return self._encode(record, messages, _media_of(self.sample(index), messages), **parts)
        except (BadSample, MissingPackageError):
            raise
        except UserError as error:
            raise BadSample(record.id, self.place(index), str(error)) from error

    def _load(self, index: int, *, is_measured: bool = False) -> Sample:
        record = self.records[index]
        try:
            read = self.reader.measure if is_measured else self.reader.read
            media = read(record, partial(self.find_medium, index))
            sample = self._encode(record, record.messages, media)
            num_tokens = sample.tokens_T.numel()
            if self.max_tokens is not None and num_tokens > self.max_tokens:
                raise UserError(
                    f"it has {num_tokens} tokens but max_tokens is {self.max_tokens}; raise max_tokens, shorten the "
                    "sample or lower the pixel budget of the processor"
                )
        except MissingPackageError:
            raise
        except UserError as error:
            raise BadSample(record.id, self.place(index), str(error)) from error
        return sample

    def _encode(self, record: Record, messages: tuple[Message, ...], media: MediaByKind, **parts: bool) -> Sample:
        return encode_sample(messages, self.processor, media, tools=record.tools, id=record.id, **parts)

    def _keep(self, index: int, sample: Sample) -> None:
        """Keep until full, never evict: under a random order each epoch, a fixed share of hits beats none."""
        tensors = [sample.tokens_T, sample.labels_T, sample.kinds_T]
        tensors += [media.inputs_UF for media in (*sample.images, *sample.videos, *sample.audios)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        with self._lock:
            if size <= self._cache_room and index not in self._cache:
                self._cache_room -= size
                self._cache[index] = sample


def _media_of(sample: Sample, messages: Sequence[Message]) -> MediaByKind:
    """The media of a sample that stand in its first messages."""
    return {kind: items[: count_media(messages, kind)] for kind, items in media_of(sample).items()}
