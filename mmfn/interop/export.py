"""Writing folders of weights: safetensors, config and asset files, by any number of processes, published by a rename.

What a folder is going to hold (`Contents`) follows from specs and settings alone. So one process makes its files, all
of them empty, and then each writes the elements that it has where they belong: none holds what another one has.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfn.dtypes import at_least
from mmfn.errors import UserError
from mmfn.interop import verbatim
from mmfn.interop.files import INDEX, SINGLE
from mmfn.interop.folder_swap import swap
from mmfn.interop.verbatim import Span
from mmfn.interop.weight_files import Stored, WeightFile, in_order, open_files, sync, weight_file, write_part
from mmfn.models.disk_tensor import DiskTensor, Ranges, whole
from mmfn.models.keymap import KeyMap
from mmfn.tree import Tree

# Files of a checkpoint folder that are neither weights nor config.json.
ASSETS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


def check_layout(specs: Tree, key_map: KeyMap, layout: str) -> None:
    """Raise ValueError where transformers would misread the layout.

    It tells layouts apart by the shape of each tensor alone, so it takes one whose dims are in another order than its
    own, but of the same sizes, for its own.
    """
    library = key_map.disk_tensors(specs, "transformers")
    for name, tensor in key_map.disk_tensors(specs, layout).items():
        if name in library and tensor.shape == library[name].shape and tensor.dims != library[name].dims:
            raise UserError(
                f"tensor {name!r} has shape {list(tensor.shape)} in every layout, so transformers would misread that "
                f"of {layout!r}; save with layout='transformers' (in a config: output.experts)"
            )


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a folder is going to hold.

    `files`: of weights, by name. `places`: the file of every tensor. `leaves`: by path, the tensors that hold a leaf;
    `dtypes`: what they have. `spans`: tensors that are copied. `texts`: other files, by name; `assets`: those that are
    copied.
    """

    files: Mapping[str, WeightFile]
    places: Mapping[str, str]
    leaves: Mapping[str, Sequence[tuple[str, DiskTensor]]]
    dtypes: Mapping[str, torch.dtype]
    spans: Mapping[str, Span] = field(default_factory=dict)
    texts: Mapping[str, str]
    assets: Sequence[Path] = ()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a process writes of a leaf: its `ranges` of it, `values`, on any device."""

    path: str
    ranges: Ranges
    values: Tensor

    @classmethod
    def whole(cls, path: str, values: Tensor) -> "Piece":
        """All of a leaf."""
        return cls(path=path, ranges=whole(values.shape), values=values)


@dataclass(frozen=True, kw_only=True)
class Writers:
    """The processes that write a folder together: this one's number and how many there are.

    `on_all(work)`: what `work` returns on each of them, in their order; where it raises on one, all of them raise.
    """

    index: int = 0
    size: int = 1
    on_all: Callable[[Callable[[], Any]], Sequence[Any]] = lambda work: [work()]


ALONE = Writers()


def contents(
    tensors: Mapping[str, DiskTensor],
    dtypes: Mapping[str, torch.dtype],
    texts: Mapping[str, str],
    *,
    assets: Path | None = None,
    extra: Mapping[str, Span] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    single: str = SINGLE,
) -> Contents:
    """What a folder with `tensors` is going to hold.

    `dtypes`: of the leaves by path; a leaf that declares a wider one is stored in that. `assets`: the folder that other
    files are copied from. `extra`: tensors of another checkpoint that are copied into this one as they are, in files of
    their own. `single`: the name of the file, where it is one. Raises ValueError for a bad size, and unless `assets` is
    a folder.
    """
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_shard_bytes} but must be positive; 5_000_000_000 is usual")
    if assets is not None and not assets.is_dir():
        raise UserError(f"assets {assets} is not a folder; pass the folder that holds the tokenizer files")
    spans, leaves = extra or {}, dict[str, list[tuple[str, DiskTensor]]]()
    kinds = {path: at_least(t.leaf.dtype, dtypes[path]) for path, t in {t.path: t for t in tensors.values()}.items()}
    for name, tensor in tensors.items():
        leaves.setdefault(tensor.path, []).append((name, tensor))
    stored = {name: Stored.of(kinds[tensor.path], tensor.shape) for name, tensor in tensors.items()}
    shards = [in_order({n: stored[n] for n in names}) for names in _shards(stored, max_shard_bytes)]
    passed = {name: span.stored for name, span in sorted(spans.items(), key=lambda item: item[1].order)}
    shards += [
        {n: one for n, one in passed.items() if n in names}
        for names in map(set, _shards({n: spans[n].stored for n in spans}, max_shard_bytes))
        if names
    ]
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = [single] if len(shards) == 1 else files
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    if len(files) > 1:
        total = sum(one.nbytes for shard in shards for one in shard.values())
        texts = {**texts, INDEX: json_text({"metadata": {"total_size": total}, "weight_map": places})}
    return Contents(
        files={file: weight_file(shard) for file, shard in zip(files, shards, strict=True)},
        places=places,
        leaves=leaves,
        dtypes=kinds,
        spans=spans,
        texts=texts,
        assets=[path for path in _assets(assets) if path.name not in texts],
    )


def json_text(value: Mapping[str, Any]) -> str:
    """A JSON file as Hugging Face writes them."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def check_empty(folder: Path) -> None:
    """Raise ValueError where a folder is to be made but something is in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"target {folder} exists and is not an empty folder; choose another, or remove it")


def check_target(folder: Path, *, overwrite: bool, config: str = "config.json") -> None:
    """Raise ValueError when `folder` exists and is neither empty nor, with `overwrite`, one with that config in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise UserError(f"target {folder} exists and is not an empty folder; choose another or pass overwrite=True")
        if not (folder / config).is_file():
            raise UserError(f"target {folder} is no checkpoint (no {config}) and stays as it is; choose another")


def save(folder: Path, what: Contents, pieces: Iterable[Piece], writers: Writers = ALONE) -> None:
    """Write a folder beside `folder` and rename it into place, durable: a reader never sees half of one.

    All `writers` call it, with the same contents and, together, every element of every leaf once. What may be replaced
    was asked before (`check_target`); it is whole until the new one is. A link is followed. Raises OSError when the
    disk does not take it, or what `writers` make of it.
    """
    folder = folder.resolve()
    with ExitStack() as stack:

        def begin() -> str:
            with naming(folder):
                return "" if writers.index else str(stack.enter_context(_new_folder(folder, what)))

        def find() -> None:
            if not fresh.is_dir():
                raise UserError(
                    f"{fresh}, which the first rank has made, is not there; all ranks need one folder in common"
                )

        def fill() -> None:
            with naming(folder):
                _fill(fresh, what, iter(pieces), writers)

        def finish() -> None:
            with naming(folder):
                if not writers.index:
                    publish(fresh, folder)

        fresh = Path(writers.on_all(begin)[0])
        writers.on_all(find)  # before any of them exchanges values with another
        writers.on_all(fill)
        writers.on_all(finish)


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """An error of the system is told of the folder that is asked for, not of the temporary one beside it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        name = Path(os.fsdecode(error.filename)).name if isinstance(error.filename, str | bytes) else ""
        what = f"{error.strerror} ({name})" if name and name != folder.name else str(error.strerror)
        raise OSError(error.errno, what, str(folder)) from error


@contextmanager
def folder_beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, removed at the end unless it was given that name (`publish`)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()  # not the temporary folder itself, whose mode is private
        yield fresh


@contextmanager
def _new_folder(folder: Path, what: Contents) -> Iterator[Path]:
    """The new folder with all its files, those of weights with their headers and as large as they will be."""
    with folder_beside(folder) as fresh:
        needed, free = sum(file.num_bytes for file in what.files.values()), shutil.disk_usage(fresh).free
        if needed > free:
            said = f"{needed / 2**30:.2f} GiB are needed but {free / 2**30:.2f} GiB free"
            raise OSError(errno.ENOSPC, said, str(folder))
        for name, text in what.texts.items():
            (fresh / name).write_text(text, encoding="utf-8")
        for source in what.assets:
            shutil.copyfile(source, fresh / source.name)
        for name, file in what.files.items():
            with open(fresh / name, "wb") as target:
                target.write(file.head)
                target.truncate(file.num_bytes)
        yield fresh


def _fill(folder: Path, what: Contents, pieces: Iterator[Piece], writers: Writers) -> None:
    """Write this process's elements, and of the tensors that are copied the pieces whose turn it is."""
    with open_files(folder) as files:
        try:
            for piece in pieces:
                dtype = what.dtypes[piece.path]
                values = piece.values.detach().to("cpu", dtype)
                for name, tensor in what.leaves[piece.path]:
                    if (part := tensor.part(piece.ranges)) is not None:
                        file = what.places[name]
                        write_part(files, file, what.files[file].begins[name], part, values)
                del piece, values  # of the next leaf's memory nothing is taken by this one
        except OSError:
            for _ in pieces:  # the others may exchange values with this process for theirs
                pass
            raise
        for name, offset, data in verbatim.pieces(what.spans, writers.index, writers.size):
            file = what.places[name]
            files.write(file, what.files[file].begins[name] + offset, data)
        files.sync()


def _shards(tensors: Mapping[str, Stored], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut before a shard would exceed the size; a larger tensor is a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, one in tensors.items():
        if shards[-1] and filled + one.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += one.nbytes
    return shards


def _assets(folder: Path | None) -> Sequence[Path]:
    if folder is None:
        return []
    return sorted({path for pattern in ASSETS for path in folder.glob(pattern) if path.is_file()})


def publish(fresh: Path, folder: Path) -> None:
    """Make everything in `fresh` durable, then it `folder`; what was there is deleted with what is around `fresh`."""
    for path in (*fresh.rglob("*"), fresh):
        sync(path)
    swap(fresh, folder)
    sync(folder.parent)
