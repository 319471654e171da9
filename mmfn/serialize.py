"""Small pytrees as bytes: msgpack with tensors, a version and a checksum. No pickle, nothing in it can run.

Layout: the four bytes `mmfn`, one byte version, 8 bytes length and 4 bytes CRC-32 of the body (big endian), then the
body. In it a tensor is extension 1 (dtype name, shape, bytes in row-major little-endian order), a tuple extension 2.
"""

import math
import struct
import sys
import zlib
from typing import Any

import msgpack
import torch
from torch import Tensor

from mmfn.errors import UserError
from mmfn.tree import Tree

MAGIC, VERSION = b"mmfn", 1
_HEADER = struct.Struct(">4sBQI")
_TENSOR, _TUPLE = 1, 2
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}


def dumps(tree: Tree) -> bytes:
    """A tree of dicts (string keys), lists, tuples, tensors, ints of 64 bits, floats, strings, bytes, bools and None.

    Tensors may be on any device; they come back on the CPU. Raises ValueError naming the path of a value that cannot
    be written. The same tree gives the same bytes (dicts keep their order).
    """
    body = _pack(_encode(tree, ""))
    return _HEADER.pack(MAGIC, VERSION, len(body), zlib.crc32(body)) + body


def loads(data: bytes) -> Tree:
    """Inverse of `dumps`: equal values, equal types, bitwise equal tensors.

    Raises ValueError when the data is not mmfn's, of another version, cut short or damaged.
    """
    if len(data) < _HEADER.size or not data.startswith(MAGIC):
        raise UserError(f"the data ({len(data)} bytes) does not begin with mmfn's header; it was not written by dumps")
    _, version, length, checksum = _HEADER.unpack_from(data)
    body = data[_HEADER.size :]
    if version != VERSION:
        raise UserError(
            f"the data has format version {version} but this mmfn reads {VERSION}; use the mmfn that wrote it"
        )
    if len(body) != length:
        raise UserError(
            f"the data holds {len(body)} bytes behind its header but {length} were written; it is cut short"
        )
    if zlib.crc32(body) != checksum:
        raise UserError(f"the data of {length} bytes does not match its checksum; it is damaged, write it again")
    return _unpack(body)


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, ext_hook=_decode, raw=False, strict_map_key=True)


def _encode(value: Any, path: str) -> Any:
    where = path or "the root"
    if value is None or isinstance(value, bool | float | str | bytes):
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise UserError(f"{where} is {value}, which needs more than 64 bits; store it as a string")
        return value
    if isinstance(value, Tensor):
        return msgpack.ExtType(_TENSOR, _pack(_encode_tensor(value, where)))
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise UserError(f"{where} has the key {odd[0]!r} but keys must be strings; convert it")
        return {key: _encode(child, f"{path}/{key}".lstrip("/")) for key, child in value.items()}
    if type(value) in (list, tuple):
        children = [_encode(child, f"{path}/{i}".lstrip("/")) for i, child in enumerate(value)]
        return children if isinstance(value, list) else msgpack.ExtType(_TUPLE, _pack(children))
    raise UserError(
        f"{where} is of type {type(value).__name__}, which cannot be written; use dicts, lists, tuples, tensors, "
        "numbers, strings, bytes, bools and None"
    )


def _encode_tensor(value: Tensor, where: str) -> list[Any]:
    name = str(value.dtype).removeprefix("torch.")
    if name not in _DTYPES or value.layout != torch.strided or sys.byteorder != "little":
        raise UserError(f"{where} is a {value.layout} tensor of {value.dtype}, which cannot be written; convert it")
    flat = value.detach().cpu().contiguous().reshape(-1)
    return [name, list(value.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""]


def _decode(code: int, data: bytes) -> Any:
    if code == _TUPLE:
        return tuple(_unpack(data))
    if code != _TENSOR:
        raise UserError(f"the data holds extension {code}, which this mmfn does not know; use the mmfn that wrote it")
    name, shape, raw = _unpack(data)
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=_DTYPES[name])
    return torch.frombuffer(bytearray(raw), dtype=_DTYPES[name]).reshape(shape)
