"""What is in the folder of a checkpoint: names, the header of a file of slices, and the manifest as bytes and back.

Every byte of a file is under exactly one SHA-256: each slice under one for every `BLOCK` bytes of it, which stand in
the header of the file, and the header under one in the manifest. So a reader that wants a part of a slice reads and
checks the blocks around that part and no others, and nothing that all ranks read grows with what each of them wrote:
which rank wrote which part of a leaf follows from the leaf's `Cut`.
"""

import base64
import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any

from mmfn import serialize
from mmfn.errors import UserError
from mmfn.interop.files import DTYPES
from mmfn.models.disk_tensor import sizes
from mmfn.parallel.weights.slices import Cut

MANIFEST, LATEST = "manifest.msgpack", "latest_checkpointed_iteration.txt"
VERSION = 2
BLOCK = 8 << 20  # bytes under one digest; a multiple of every dtype's size
DIGEST_BYTES = hashlib.sha256().digest_size
_FOLDER, _FILE = re.compile(r"iter_(\d{7,})"), re.compile(r"rank_(\d{5,})\.safetensors")


def folder_name(step: int) -> str:
    """The name of the checkpoint behind a step."""
    return f"iter_{step:07d}"


def step_of(name: str) -> int | None:
    """The step of a folder's name, None for any other name."""
    found = _FOLDER.fullmatch(name)
    return int(found[1]) if found and name == folder_name(int(found[1])) else None


def file_name(rank: int) -> str:
    """The file of a rank's slices."""
    return f"rank_{rank:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run needs beside its state to go on, and what wrote it.

    `step`: steps taken. `cursor`: where it is in the order of data. `config`: the text of its settings. `layout`: sizes
    of the mesh axes. `loss`: on held-out data, where it was measured. `extra`: anything else that is small.
    """

    step: int
    cursor: Mapping[str, int | str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    config: str = ""
    layout: Mapping[str, int] = field(default_factory=dict)
    loss: float | None = None
    extra: Mapping[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Leaf:
    """A whole leaf: its dtype, as safetensors names it, its shape, and how it lay on the ranks.

    Of equal copies of a part `copy` was written.
    """

    dtype: str
    shape: tuple[int, ...]
    cut: Cut
    copy: int

    @property
    def item_bytes(self) -> int:
        """Of one element."""
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class File:
    """A file of slices: its size, that of its header and the header's digest."""

    num_bytes: int
    head_bytes: int
    head_digest: bytes


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that a checkpoint says of itself. `id`: of this save alone; it stands in the header of each file as well.

    `files`: those of all ranks that wrote something, by name.
    """

    facts: Facts
    id: str
    world: int
    versions: Mapping[str, str]
    leaves: Mapping[str, Leaf]
    files: Mapping[str, File]


@dataclass(frozen=True)
class Chunk:
    """A part of the leaf `path`, of that shape, row-major from byte `begin` of its file on.

    `digests`: of its blocks, joined.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    digests: bytes

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def blocks_in(num_bytes: int) -> int:
    """How many digests so many bytes have."""
    return -(-num_bytes // BLOCK)


def place_chunks(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[list[Chunk], int]:
    """Parts of leaves `{path: (dtype, shape)}` as they lie in a file, and the size of its header; without digests.

    Wide dtypes come first, so that every part is aligned.
    """
    order = sorted(shapes.items(), key=lambda item: (-DTYPES[item[1][0]].itemsize, item[0]))
    chunks = [Chunk(path, code, tuple(shape), 0, b"") for path, (code, shape) in order]
    head_bytes = len(header(chunks, "0" * 32, b"\0" * DIGEST_BYTES * sum(blocks_in(c.num_bytes) for c in chunks)))
    begin, parts = head_bytes, list[Chunk]()
    for chunk in chunks:
        parts.append(Chunk(chunk.path, chunk.dtype, chunk.shape, begin, b""))
        begin += chunk.num_bytes
    return parts, head_bytes


def header(chunks: list[Chunk], save_id: str, digests: bytes) -> bytes:
    """The header of a safetensors file of chunks in their order, `digests` of all their blocks among its metadata."""
    text = base64.b64encode(digests).decode()
    table: dict[str, Any] = {"__metadata__": {"format": "pt", "save": save_id, "digests": text}}
    end = 0
    for chunk in chunks:
        start, end = end, end + chunk.num_bytes
        table[chunk.path] = {"dtype": chunk.dtype, "shape": list(chunk.shape), "data_offsets": [start, end]}
    data = json.dumps(table, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    return struct.pack("<Q", len(data)) + data


def chunks_in(head: bytes) -> dict[str, Chunk]:
    """The chunks of a header by path; it is one that `header` made, which its digest has shown."""
    table = json.loads(head[8:])
    digests = memoryview(base64.b64decode(table.pop("__metadata__")["digests"]))
    chunks = {}
    for path, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        size = blocks_in(end - begin) * DIGEST_BYTES
        shape = tuple(entry["shape"])
        chunks[path] = Chunk(path, entry["dtype"], shape, len(head) + begin, bytes(digests[:size]))
        digests = digests[size:]
    return chunks


def dumps(manifest: Manifest) -> bytes:
    """A manifest as bytes, with a checksum."""
    cuts = list(dict.fromkeys(leaf.cut for leaf in manifest.leaves.values()))
    numbers = {cut: number for number, cut in enumerate(cuts)}
    return serialize.dumps(
        {
            "version": VERSION,
            "block": BLOCK,
            **{name: _plain(value) for name, value in asdict(manifest.facts).items()},
            "id": manifest.id,
            "world": manifest.world,
            "versions": dict(manifest.versions),
            "cuts": [[list(cut.sizes), list(cut.dims)] for cut in cuts],
            "leaves": {
                name: [leaf.dtype, list(leaf.shape), numbers[leaf.cut], leaf.copy]
                for name, leaf in manifest.leaves.items()
            },
            "files": {name: [f.num_bytes, f.head_bytes, f.head_digest] for name, f in manifest.files.items()},
        }
    )


def loads(data: bytes) -> Manifest:
    """Inverse of `dumps`. Raises ValueError, one sentence, unless it is a manifest in which everything fits."""
    raw = serialize.loads(data)
    if not isinstance(raw, dict) or "version" not in raw:
        raise UserError("it is no manifest of a checkpoint")
    if (raw["version"], raw.get("block")) != (VERSION, BLOCK):
        raise UserError(f"it has version {raw['version']} but this mmfn reads {VERSION}; use the mmfn that wrote it")
    try:
        manifest = _manifest(raw)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"it is no manifest of a checkpoint ({type(error).__name__}: {error})") from error
    check(manifest)
    return manifest


def _manifest(raw: Mapping[str, Any]) -> Manifest:
    cuts = [Cut(tuple(sizes), tuple(dims)) for sizes, dims in raw["cuts"]]
    return Manifest(
        facts=Facts(**{f.name: raw[f.name] for f in fields(Facts)}),
        id=raw["id"],
        world=raw["world"],
        versions=raw["versions"],
        leaves={
            name: Leaf(dtype, tuple(shape), cuts[cut], copy)
            for name, (dtype, shape, cut, copy) in raw["leaves"].items()
        },
        files={name: File(*facts) for name, facts in raw["files"].items()},
    )


def check(manifest: Manifest) -> None:
    """Raise ValueError unless every leaf lies on the ranks, and the files are those of what each of them held.

    The parts of a `Cut` hold every element of a leaf once.
    """
    for path, leaf in manifest.leaves.items():
        if leaf.dtype not in DTYPES or not all(size >= 0 for size in leaf.shape):
            raise UserError(f"its leaf {path} has dtype {leaf.dtype!r} and shape {leaf.shape}, which no leaf has")
        cut, dims = leaf.cut, range(len(leaf.shape))
        is_grid = len(cut.sizes) == len(cut.dims) and cut.num_ranks == manifest.world and min(cut.sizes) > 0
        if not is_grid or not {*cut.dims} <= {None, *dims} or not 0 <= leaf.copy < cut.num_copies:
            raise UserError(f"its leaf {path} is cut as no leaf of {manifest.world} ranks is")
    written = {
        file_name(rank): size for rank, size in enumerate(bytes_written(manifest.leaves, manifest.world)) if size
    }
    if odd := sorted(written.keys() ^ manifest.files.keys()):
        what = "is none that a rank wrote" if odd[0] in manifest.files else "is not among its files"
        raise UserError(f"{odd[0]} {what}")
    for name, file in manifest.files.items():
        if file.num_bytes != file.head_bytes + written[name]:
            raise UserError(
                f"its {name} has {file.num_bytes - file.head_bytes} bytes of leaves instead of {written[name]}"
            )


def bytes_written(leaves: Mapping[str, Leaf], world: int) -> list[int]:
    """How many bytes of leaves each rank writes."""
    alike = Counter((leaf.cut, leaf.copy, leaf.shape, leaf.item_bytes) for leaf in leaves.values())
    written = [0] * world
    for (cut, copy, shape, item_bytes), count in alike.items():
        for rank in range(world):
            if cut.copy_of(rank) == copy:
                written[rank] += count * item_bytes * prod(sizes(cut.ranges(shape, rank)))
    return written


def paths_in(manifest: Manifest, name: str) -> Iterator[str]:
    """The leaves of which there is a part in a file."""
    found = _FILE.fullmatch(name)
    assert found is not None, "the manifest has no other files"
    rank = int(found[1])
    for path, leaf in manifest.leaves.items():
        ranges = leaf.cut.ranges(leaf.shape, rank)
        if leaf.cut.copy_of(rank) == leaf.copy and all(start < stop for start, stop in ranges):
            yield path


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
