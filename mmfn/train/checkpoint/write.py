"""Writing a checkpoint: every rank its slices, then one rename that makes all of them one.

A save is durable when `save` returns, on all ranks, and not there at all when it raises, on all ranks. Its folder gets
its name last: until then whatever kills the run leaves a hidden folder that no reader looks at.
"""

import hashlib
import json
import os
import platform
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import mmfn
from mmfn import tree
from mmfn.errors import UserError
from mmfn.interop.files import CODES
from mmfn.interop.weight_files import bytes_of, sync
from mmfn.parallel.mesh import host_values
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.weights.sharding import local
from mmfn.parallel.weights.slices import Turns, cut_of
from mmfn.train.checkpoint import read
from mmfn.train.checkpoint.disk import (
    drop_cache,
    remove_leftovers,
    scratch_folder,
    scratch_path,
    write_file,
    write_latest,
)
from mmfn.train.checkpoint.format import (
    BLOCK,
    MANIFEST,
    Facts,
    File,
    Leaf,
    Manifest,
    check,
    dumps,
    file_name,
    folder_name,
    header,
    place_chunks,
)
from mmfn.tree import Tree

on_all = partial(host_values.on_all, wraps_alone=True)
"""A save fails with one sentence on a single rank, too."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a rank writes: `pieces`, its values of leaves, on any device. `leaves`: all, the same on all ranks.

    `plain`: digests of those that are no shards, which ranks must have the same, so that this can be checked.
    """

    leaves: Mapping[str, Leaf]
    pieces: Mapping[str, Tensor]
    plain: Mapping[str, str]


def leaves_of(items: Iterable[tuple[str, Tensor]], world: Axis) -> dict[str, Leaf]:
    """How leaves `(path, leaf)` lie on the ranks, without communication.

    Which of the ranks that hold equal copies of a part writes it follows from the leaves alone, so that each of them
    writes as many bytes as the others; what is no shard is small, and the first rank's.
    """
    leaves: dict[str, Leaf] = {}
    turns = Turns()
    for path, leaf in items:
        if leaf.dtype not in CODES:
            raise UserError(f"{path} has dtype {leaf.dtype}, which no checkpoint can hold; convert it")
        cut, copy = cut_of(leaf, world), 0
        if local(leaf) is not leaf:  # a shard
            copy = turns.next(cut.num_copies, leaf.numel() * leaf.dtype.itemsize)
        leaves[path] = Leaf(CODES[leaf.dtype], tuple(leaf.shape), cut, copy)
    return leaves


def part_of(state: Tree, world: Axis) -> Part:
    """This rank's part of a state; its pieces are views. No communication."""
    leaves, pieces, plain = leaves_of(tree.items(state), world), {}, {}
    for path, leaf in tree.items(state):
        values, place = local(leaf).detach(), leaves[path]
        if place.cut.copy_of(world.index) == place.copy and values.numel():
            pieces[path] = values
        if local(leaf) is leaf and world.size > 1:
            plain[path] = hashlib.sha256(bytes_of(values.cpu().contiguous())).hexdigest()
    return Part(leaves=leaves, pieces=pieces, plain=plain)


def save(root: Path, state: Tree, facts: Facts, world: Axis) -> Path:
    """Write a checkpoint of a state into `root`, its folder and its parents made as needed; all ranks call it.

    `world`: all ranks, on the CPU, with a file system in common. `state`: any tree of tensors and shards, of which
    copies to the host may not be under way. What is durable when: the files of all ranks; then the manifest in their
    hidden folder; then the name of the folder, from where on it counts; then `latest_checkpointed_iteration.txt`.
    Returns the folder. Raises ValueError on all ranks, one sentence, for whatever goes wrong on any of them, with
    nothing published, and where there is a whole checkpoint of that step already (a damaged one is renamed). Hidden
    folders of saves that were killed are removed; those of other processes that live are not.
    """
    return publish(root, part_of(state, world), facts, world)


def publish(
    root: Path, part: Part, facts: Facts, world: Axis, *, logs: Sequence[Path] = (), reads_back: bool = False
) -> Path:
    """`save` of parts of a state, which are only read. It may run in a thread, with a `world` of its own.

    `logs`: of the first rank, durable before the checkpoint counts, where they exist. `reads_back`: each rank then
    reads its file from the disk, not from memory, and compares it.
    """
    name = folder_name(facts.step)
    what = f"saving checkpoint {name}"
    with ExitStack() as stack:
        claims = on_all(lambda: _begin(stack, root, name, part, world), world, what)
        save_id = claims[0]["id"]
        folder = scratch_path(root, name, save_id)
        on_all(lambda: _check_alike(claims, part, world), world, what)
        written = on_all(lambda: _write_pieces(folder, part, save_id, world.index), world, what)

        def finish() -> None:
            if world.index == 0:
                for log in logs:
                    if log.exists():
                        sync(log)
                files = {file_name(rank): _file(*one) for rank, one in enumerate(written) if one}
                write_file(folder / MANIFEST, [(0, dumps(_manifest(part.leaves, files, facts, save_id, world.size)))])
                sync(folder)

        on_all(finish, world, what)
        if reads_back:
            on_all(lambda: _read_back(folder, world.index), world, what)

        def rename() -> None:
            if world.index == 0:
                os.rename(folder, root / name)
                _make_known(root, facts.step)

        on_all(rename, world, what)
    return root / name


def _begin(stack: ExitStack, root: Path, name: str, part: Part, world: Axis) -> dict[str, str]:
    """Make the hidden folder, on the first rank, until the end of `stack`; what ranks have to compare."""
    save_id = ""
    if world.index == 0:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        if os.path.lexists(root / name):
            _move_damaged(root, name)
        save_id = stack.enter_context(scratch_folder(root, name)).id
    leaves = [[path, leaf.dtype, leaf.shape, leaf.cut.sizes, leaf.cut.dims] for path, leaf in part.leaves.items()]
    return {"id": save_id, "leaves": _digest(leaves), "plain": _digest(part.plain)}


def _move_damaged(root: Path, name: str) -> None:
    """Rename what has the name of a checkpoint but is none. Raises ValueError where it is whole."""
    try:
        read.verify(read.open_checkpoint(root / name))
    except UserError:
        os.rename(root / name, root / f"{name}.damaged-{secrets.token_hex(4)}")
        return
    raise UserError(f"{root / name} is a whole checkpoint already; give the run another folder, or resume from it")


def _write_pieces(folder: Path, part: Part, save_id: str, rank: int) -> tuple[int, int, str] | None:
    """Write this rank's file, if it has something to write; the sizes of it and its header, and the header's digest."""
    if not part.pieces:
        return None
    chunks, head_bytes = place_chunks(
        {path: (part.leaves[path].dtype, tuple(v.shape)) for path, v in part.pieces.items()}
    )
    digests: list[bytes] = []
    head = b""

    def content() -> Iterator[tuple[int, bytes | memoryview]]:
        nonlocal head
        for chunk in chunks:
            data = bytes_of(part.pieces[chunk.path].cpu().contiguous())
            for start in range(0, len(data), BLOCK):
                block = data[start : start + BLOCK]
                digests.append(hashlib.sha256(block).digest())
                yield chunk.begin + start, block
        head = header(chunks, save_id, b"".join(digests))
        yield 0, head

    size = chunks[-1].begin + chunks[-1].num_bytes
    write_file(folder / file_name(rank), content(), size)
    sync(folder)
    return size, head_bytes, hashlib.sha256(head).hexdigest()


def _read_back(folder: Path, rank: int) -> None:
    """Raise ValueError unless the disk has what this rank wrote. The memory that holds it is dropped first."""
    checkpoint = read.open_manifest(folder)
    if (name := file_name(rank)) in checkpoint.manifest.files:
        drop_cache(folder / name)
        read.verify_file(checkpoint, name)


def _file(num_bytes: int, head_bytes: int, head_digest: str) -> File:
    return File(num_bytes, head_bytes, bytes.fromhex(head_digest))


def _manifest(
    leaves: Mapping[str, Leaf], files: Mapping[str, File], facts: Facts, save_id: str, world: int
) -> Manifest:
    """What all ranks have written, checked to be whole."""
    versions = {"mmfn": mmfn.__version__, "torch": torch.__version__, "python": platform.python_version()}
    manifest = Manifest(facts=facts, id=save_id, world=world, versions=versions, leaves=leaves, files=files)
    check(manifest)
    return manifest


def _check_alike(claims: Sequence[Mapping[str, str]], part: Part, world: Axis) -> None:
    """Raise ValueError where this rank has other leaves than the first, or other values of those that are plain."""
    own, first = claims[world.index], claims[0]
    if any(other["plain"] != first["plain"] for other in claims):  # the same on all ranks: then they say which
        plain = host_values.gather_values(dict(part.plain), world, "checkpoint")[0]
        for path, digest in plain.items():
            if part.plain.get(path, digest) != digest:
                raise UserError(f"its {path} differs from rank 0's but is no shard; ranks do not compute the same")
    if own["leaves"] != first["leaves"]:
        raise UserError("its state has other leaves, shapes or dtypes than rank 0's; start all ranks with one config")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _make_known(root: Path, step: int) -> None:
    """Make the new name of a folder durable, then replace the tracker as a whole."""
    try:
        sync(root)
        write_latest(root, step)
    except OSError as error:
        raise UserError(f"it is whole, but {root} cannot be written to any more ({error.strerror})") from error
