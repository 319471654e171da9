"""Small pytrees as bytes."""

import math
import pickle
import struct

import pytest
import torch

from mmfn import serialize

TREE = {
    "step": 3,
    "largest": 2**63,
    "loss": 0.1,
    "name": "grüße",
    "raw": b"\x00\xff",
    "flags": [True, False, None],
    "pair": (1, ("a", [2.5])),
    "empty": {"list": [], "dict": {}, "tuple": ()},
}
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64]


def test_values_and_types_come_back():
    back = serialize.loads(serialize.dumps(TREE))
    assert back == TREE
    assert type(back["pair"]) is tuple
    assert type(back["pair"][1]) is tuple
    assert back["flags"][0] is True


def test_special_floats_come_back():
    back = serialize.loads(serialize.dumps([math.inf, -0.0, math.nan]))
    assert back[0] == math.inf
    assert math.copysign(1, back[1]) == -1
    assert math.isnan(back[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)], ids=str)
def test_tensors_come_back_bitwise(dtype, shape):
    value = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    back = serialize.loads(serialize.dumps({"x": value}))["x"]
    assert back.dtype == dtype
    assert back.shape == value.shape
    assert torch.equal(back, value)
    back.zero_()  # writable, and not a view of the bytes


def test_views_and_gradients_are_stored_as_plain_values():
    value = torch.arange(12.0).reshape(3, 4).T.requires_grad_()
    back = serialize.loads(serialize.dumps(value))
    assert torch.equal(back, value)
    assert not back.requires_grad


def test_the_same_tree_gives_the_same_bytes():
    assert serialize.dumps(TREE) == serialize.dumps(dict(TREE))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [0, {1}]}, "a/1 is of type set"),
        ({"a": {1: 2}}, "a has the key 1 but keys must be strings"),
        (2**64, "the root is 18446744073709551616, which needs more than 64 bits"),
        ({"x": torch.zeros(2, dtype=torch.complex64)}, "x is a torch.strided tensor of torch.complex64"),
        ({"x": torch.eye(2).to_sparse()}, "x is a torch.sparse_coo tensor"),
    ],
)
def test_what_cannot_be_written_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        serialize.dumps(value)


def test_damage_is_refused():
    data = serialize.dumps(TREE)
    for cut in (0, 3, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match=r"cut short|does not begin with"):
            serialize.loads(data[:cut])
    with pytest.raises(ValueError, match="cut short"):
        serialize.loads(data + b"x")
    flipped = bytearray(data)
    flipped[-1] ^= 1
    with pytest.raises(ValueError, match="does not match its checksum"):
        serialize.loads(bytes(flipped))
    with pytest.raises(ValueError, match="was not written by dumps"):
        serialize.loads(pickle.dumps(TREE))
    newer = data[:4] + struct.pack("B", serialize.VERSION + 1) + data[5:]
    with pytest.raises(ValueError, match="format version 2 but this mmfn reads 1"):
        serialize.loads(newer)
