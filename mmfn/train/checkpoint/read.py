"""Reading a checkpoint: the newest whole one of a run, and of it the slices of this rank, whatever mesh wrote it.

A rank opens each file once and reads the blocks that hold elements of its own slices, every one of them against its
digest. What is damaged is one sentence that names the leaf and the file.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mmfn import tree
from mmfn.errors import UserError
from mmfn.interop.files import CODES, DTYPES
from mmfn.interop.weight_files import bytes_of
from mmfn.models.disk_tensor import Ranges, overlap, sizes, slices, within
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.host_values import gather_values
from mmfn.parallel.weights.sharding import local
from mmfn.parallel.weights.slices import cut_of
from mmfn.train.checkpoint.format import (
    BLOCK,
    DIGEST_BYTES,
    LATEST,
    MANIFEST,
    Chunk,
    Manifest,
    blocks_in,
    chunks_in,
    file_name,
    folder_name,
    loads,
    paths_in,
    step_of,
)
from mmfn.tree import Tree


class DamagedError(UserError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint: its manifest was read, its files are there. `digest`: of the manifest as it is stored."""

    folder: Path
    manifest: Manifest
    digest: str


@dataclass(frozen=True, kw_only=True)
class Search:
    """The newest whole checkpoint, if there is one, and a sentence for each newer one that is none."""

    checkpoint: Checkpoint | None
    skipped: Sequence[str]


def names(root: Path) -> list[str]:
    """Names of published checkpoints, the newest first."""
    found = [name for name in os.listdir(root) if step_of(name) is not None] if root.is_dir() else []
    return sorted(found, key=lambda name: step_of(name) or 0, reverse=True)


def newest(
    root: Path, world: Axis, *, name: str | None = None, below: int | None = None, is_thorough: bool = False
) -> Search:
    """The newest whole checkpoint in `root`, the same on all ranks of `world`; all of them call it.

    The first rank looks for it, the others read the manifest that it has found. `name`: the only one that is looked at.
    `below`: none of that step or a later one. What counts are the folders: `latest_checkpointed_iteration.txt` may be
    one behind, which is no fault. Files are looked at, but read only where `is_thorough`. Raises ValueError where ranks
    do not see the same folder.
    """
    search = _search(root, name, below, is_thorough) if world.index == 0 else Search(checkpoint=None, skipped=())
    if world.size == 1:
        return search
    found = search.checkpoint and [search.checkpoint.folder.name, search.checkpoint.digest]
    first = gather_values([found, list(search.skipped)], world, "checkpoint")[0]
    checkpoint, problem = search.checkpoint, None
    if first[0] is not None and world.index > 0:
        try:
            checkpoint = open_manifest(root / first[0][0])
            problem = None if checkpoint.digest == first[0][1] else "finds other bytes in it"
        except UserError as error:
            problem = f"finds that {error}"
    for rank, other in enumerate(gather_values(problem, world, "checkpoint")):
        if other is not None:
            raise UserError(
                f"rank 0 finds {first[0][0]} in {root} as the newest checkpoint but rank {rank} {other}; all ranks "
                "need one folder in common"
            )
    return Search(checkpoint=checkpoint, skipped=first[1])


def _search(root: Path, name: str | None, below: int | None, is_thorough: bool) -> Search:
    """`newest` as one rank finds it."""
    skipped: list[str] = []
    for found in names(root) if name is None else [name]:
        if below is not None and (step_of(found) or 0) >= below:
            continue
        try:
            checkpoint = open_checkpoint(root / found)
            if is_thorough:
                verify(checkpoint)
        except UserError as error:
            skipped.append(f"skipped {found}: {error}")
            continue
        break
    else:
        checkpoint = None
    if name is None and below is None and (latest := _latest(root)) is not None and not (root / latest).is_dir():
        skipped.insert(0, f"skipped {latest}: {LATEST} names it but there is no such folder")
    return Search(checkpoint=checkpoint, skipped=skipped)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The manifest of a folder. Raises ValueError, one sentence, unless it is sound and all files have their sizes."""
    checkpoint = open_manifest(folder)
    manifest = checkpoint.manifest
    for name, facts in manifest.files.items():
        try:
            num_bytes = os.stat(folder / name).st_size
        except OSError as error:
            raise DamagedError(f"{folder / name}, which holds {_first(manifest, name)}, is missing") from error
        if num_bytes != facts.num_bytes:
            raise DamagedError(
                f"{folder / name}, which holds {_first(manifest, name)}, has {num_bytes} bytes but {facts.num_bytes} "
                "were written"
            )
    return checkpoint


def open_manifest(folder: Path) -> Checkpoint:
    """`open_checkpoint` that does not look at the files."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror}), so the checkpoint is not whole") from error
    try:
        manifest = loads(data)
    except UserError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if (step := step_of(folder.name)) is not None and step != manifest.facts.step:
        raise DamagedError(
            f"{path} is of step {manifest.facts.step}, not of {folder.name}; it was put there from another"
        )
    return Checkpoint(folder=folder, manifest=manifest, digest=hashlib.sha256(data).hexdigest())


def verify(checkpoint: Checkpoint) -> None:
    """Read every file and compare every digest. Raises ValueError naming leaf and file of the first that differs."""
    for name in checkpoint.manifest.files:
        verify_file(checkpoint, name)


def verify_file(checkpoint: Checkpoint, name: str) -> None:
    """`verify` of one file."""
    with _open(checkpoint, name) as file:
        for chunk in file.chunks.values():
            view = memoryview(bytearray(min(BLOCK, chunk.num_bytes)))
            for block in range(blocks_in(chunk.num_bytes)):
                file.read_blocks_(chunk, block, view[: chunk.num_bytes - block * BLOCK])


def fill_(state: Tree, checkpoint: Checkpoint, world: Axis, *, is_part: bool = False) -> None:
    """Overwrite the tensors of a state with what is stored of them; all ranks of `world` call it.

    `state`: a tree with the leaves, shapes and dtypes of the one that was saved (`is_part`: or some of them), placed in
    any other way. This rank reads the parts of it that it holds. Raises ValueError on all ranks, one sentence, where a
    leaf is missing, or one too many, or has another shape or dtype; DamagedError, which is one, where anything that one
    of them reads is damaged: the state is then in part overwritten.
    """
    error, problem = None, None
    try:
        _fill(state, checkpoint, world, is_part)
    except (UserError, OSError) as caught:
        error, problem = caught, [isinstance(caught, DamagedError), str(caught)]
    for rank, other in enumerate(gather_values(problem, world, "checkpoint")):
        if other is not None:
            where = f" (rank {rank})" if world.size > 1 else ""
            kind = DamagedError if other[0] else UserError
            raise kind(f"{checkpoint.folder} cannot be resumed from{where}: {other[1]}") from error


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Elements of the leaf `path` that belong into `target`: those in `box` of its part, counted from the part's own
    first."""

    path: str
    box: Ranges
    target: Tensor


def _fill(state: Tree, checkpoint: Checkpoint, world: Axis, is_part: bool) -> None:
    leaves = dict(tree.items(state))
    _check_leaves(leaves, checkpoint, is_part)
    jobs: dict[str, list[_Job]] = {}
    for path, leaf in leaves.items():
        stored, own = checkpoint.manifest.leaves[path], cut_of(leaf, world).ranges(leaf.shape, world.index)
        if any(start == stop for start, stop in own):
            continue
        for rank, ranges in stored.cut.holders(leaf.shape, own, stored.copy):
            common = overlap(own, ranges)
            target = local(leaf).detach()[slices(within(common, own))]
            jobs.setdefault(file_name(rank), []).append(_Job(path=path, box=within(common, ranges), target=target))
    for name, group in jobs.items():
        with _open(checkpoint, name) as file:
            for job in sorted(group, key=lambda job: file.chunks[job.path].begin):
                _read_job_(file, job)


def check_shapes(shapes: Mapping[str, Sequence[int]], checkpoint: Checkpoint) -> None:
    """Raise ValueError unless a checkpoint has these leaves with these shapes; it may have more."""
    stored = checkpoint.manifest.leaves
    for path, shape in shapes.items():
        if path not in stored:
            near = get_close_matches(path, stored, 1)
            raise UserError(
                f"it has no leaf {path}{f', but {near[0]}' if near else ''}; resume with the same model and optimizer"
            )
        if tuple(shape) != stored[path].shape:
            raise UserError(
                f"its {path} has the shape {list(stored[path].shape)} but the run's {list(shape)}; resume with the "
                "same model and optimizer"
            )


def _check_leaves(leaves: dict[str, Tensor], checkpoint: Checkpoint, is_part: bool) -> None:
    """Raise ValueError unless state and checkpoint have the same leaves."""
    check_shapes({path: leaf.shape for path, leaf in leaves.items()}, checkpoint)
    stored = checkpoint.manifest.leaves
    for path, leaf in leaves.items():
        if (code := CODES.get(leaf.dtype)) != stored[path].dtype:
            raise UserError(
                f"its {path} is {stored[path].dtype} but the run's is {code}; resume with the same model and optimizer"
            )
    if not is_part and (extra := sorted(stored.keys() - leaves.keys())):
        raise UserError(f"its leaf {extra[0]} has no place in the run; resume with the same model and optimizer")


class _File:
    """An open file of slices. Its header is the one that was written: it is of this save, and nothing in it has another
    place."""

    def __init__(self, checkpoint: Checkpoint, name: str, number: int) -> None:
        self.path, self.number = checkpoint.folder / name, number
        facts, first = checkpoint.manifest.files[name], _first(checkpoint.manifest, name)
        head = bytearray(facts.head_bytes)
        self.read_(first, 0, memoryview(head))
        if hashlib.sha256(head).digest() != facts.head_digest:
            raise DamagedError(f"{self.path}, which holds {first}, is damaged or of another save: its header differs")
        self.chunks = chunks_in(bytes(head))

    def read_(self, path: str, begin: int, view: memoryview) -> None:
        """Fill `view` from byte `begin` on."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.number, [view[done:]], begin + done)
            except OSError as error:
                raise DamagedError(f"{path} cannot be read from {self.path} ({error.strerror})") from error
            if not count:
                raise DamagedError(f"{self.path} is cut short: it ends within {path}")
            done += count

    def read_blocks_(self, chunk: Chunk, first: int, view: memoryview) -> None:
        """Fill `view` with bytes of a chunk from block `first` on, whole blocks or up to its end."""
        for start in range(0, len(view), BLOCK):
            block, part = first + start // BLOCK, view[start : start + BLOCK]
            self.read_(chunk.path, chunk.begin + block * BLOCK, part)
            if hashlib.sha256(part).digest() != chunk.digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]:
                raise DamagedError(
                    f"{chunk.path} in {self.path} is damaged: its bytes differ from those that were saved"
                )


@contextmanager
def _open(checkpoint: Checkpoint, name: str) -> Iterator[_File]:
    path = checkpoint.folder / name
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError as error:
        first = _first(checkpoint.manifest, name)
        raise DamagedError(f"{path}, which holds {first}, cannot be opened ({error.strerror})") from error
    try:
        yield _File(checkpoint, name, number)
    finally:
        os.close(number)


def _read_job_(file: _File, job: _Job) -> None:
    """Read the elements of a job, straight into their place where they are a chunk whole."""
    chunk, target = file.chunks[job.path], job.target
    if sizes(job.box) == chunk.shape and target.device.type == "cpu" and target.is_contiguous():
        file.read_blocks_(chunk, 0, bytes_of(target))
        return
    dtype = DTYPES[chunk.dtype]
    for span in _spans(chunk.shape, job.box, dtype.itemsize):
        first = span.start // BLOCK
        stop = min(-(-span.stop // BLOCK) * BLOCK, chunk.num_bytes)
        buffer = torch.empty(stop - first * BLOCK, dtype=torch.uint8)
        file.read_blocks_(chunk, first, bytes_of(buffer))
        offset = (span.start - first * BLOCK) // dtype.itemsize
        part = target[span.index]
        part.copy_(buffer.view(dtype).as_strided(part.shape, _strides(chunk.shape)[len(span.index) :], offset))


@dataclass(frozen=True, kw_only=True)
class _Span:
    """Bytes of a chunk that hold what belongs into `target[index]`."""

    index: tuple[int, ...]
    start: int
    stop: int


def _spans(shape: Sequence[int], box: Ranges, item_bytes: int) -> Iterator[_Span]:
    """The bytes of a box of a row-major array: one span, or one for each row where a block fits between two of them.

    >>> [(span.start, span.stop) for span in _spans((4, 10), ((1, 3), (2, 5)), 2)]
    [(24, 50)]
    """
    if not shape:
        yield _Span(index=(), start=0, stop=item_bytes)
        return
    row_bytes = prod(shape[1:]) * item_bytes
    (start, stop), rest = box[0], box[1:]
    inner = list(_spans(shape[1:], rest, item_bytes))
    first, gap = inner[0], row_bytes - (inner[0].stop - inner[0].start)
    if len(inner) == 1 and (stop - start == 1 or gap < BLOCK):
        yield _Span(index=(), start=start * row_bytes + first.start, stop=(stop - 1) * row_bytes + first.stop)
        return
    for row in range(start, stop):
        for span in inner:
            base = row * row_bytes
            yield _Span(index=(row - start, *span.index), start=base + span.start, stop=base + span.stop)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _first(manifest: Manifest, name: str) -> str:
    """A leaf in a file."""
    return next(paths_in(manifest, name))


def _latest(root: Path) -> str | None:
    """The folder that the tracker names; None where it says nothing."""
    try:
        text = (root / LATEST).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return folder_name(int(text)) if text.isdigit() else None
