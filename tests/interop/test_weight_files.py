"""Files of weights: the bytes that safetensors writes, whoever writes them and in which pieces."""

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mmfn
from mmfn import spec, tree
from mmfn.interop import export
from mmfn.interop.files import DTYPES
from mmfn.interop.weight_files import ORDER, Stored, in_order, weight_file
from mmfn.models.disk_tensor import DiskTensor, Ranges, slices
from tests import tiny
from tests.interop import whole_export
from tests.interop.split_cases import KEY_MAP, SPECS

DISK = [(name, layout) for name in tiny.TINY if name != "toy" for layout in ("hub", "transformers")]


def test_a_file_is_that_of_safetensors(tmp_path: Path) -> None:
    assert set(ORDER) == set(DTYPES)
    names = ["b", "a.weight", 'odd "\\/', "größe", "a"]
    tensors = {f"{name} {code}": torch.arange(3).to(dtype) for code, dtype in DTYPES.items() for name in names}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(7.0, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    file = weight_file(in_order({name: Stored.of(t.dtype, tuple(t.shape)) for name, t in tensors.items()}))
    data = (tmp_path / "file").read_bytes()
    assert data.startswith(file.head)
    assert len(data) == file.num_bytes
    for name, tensor in tensors.items():
        begin, values = file.begins[name], tensor.reshape(-1)
        assert data[begin : begin + tensor.nbytes] == values.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("name", "layout"), DISK, ids=map(", ".join, DISK))
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 9_000])
def test_a_checkpoint_is_that_of_whole_tensors(name: str, layout: str, max_shard_bytes: int, tmp_path: Path) -> None:
    """With leaves that declare a wider dtype than the model's."""
    model = tiny.model_of(name)
    model = replace(model, params=tree.map(lambda leaf: leaf.to(torch.bfloat16), model.params))
    mmfn.save_hf(tmp_path / "out", model, layout=layout, max_shard_bytes=max_shard_bytes)
    whole_export.write(tmp_path / "want", whole_export.tensors_of(model, layout), max_shard_bytes)
    assert whole_export.content(tmp_path / "out") == whole_export.content(tmp_path / "want")


def cut(r: random.Random, shape: tuple[int, ...]) -> list[Ranges]:
    """Boxes that fill a shape, on grid lines."""
    boxes: list[Ranges] = [()]
    for size in shape:
        lines = sorted({0, size, *(r.randrange(size) for _ in range(r.randrange(3)))})
        boxes = [(*box, line) for box in boxes for line in pairwise(lines)]
    return boxes


@pytest.mark.parametrize("layout", KEY_MAP.layouts)
@pytest.mark.parametrize("seed", range(10))
def test_pieces_of_any_shape_make_the_same_file(seed: int, layout: str, tmp_path: Path) -> None:
    r, params = random.Random(seed), spec.init_params(SPECS, seed)
    names = KEY_MAP.disk_tensors(SPECS, layout)
    what = export.contents(names, {path: leaf.dtype for path, leaf in tree.items(params)}, {}, max_shard_bytes=900)
    pieces = [
        export.Piece(path=path, ranges=box, values=leaf[slices(box)])
        for path, leaf in tree.items(params)
        for box in cut(r, tuple(leaf.shape))
    ]
    r.shuffle(pieces)
    export.save(tmp_path / "out", what, pieces)
    leaves = dict(tree.items(params))
    whole_export.write(tmp_path / "want", {n: t.to_disk(leaves[t.path]) for n, t in names.items()}, 900)
    assert whole_export.content(tmp_path / "out") == whole_export.content(tmp_path / "want")


@pytest.mark.parametrize("seed", range(40))
def test_runs_are_the_longest_there_are(seed: int) -> None:
    """Every element of a part is stored where the whole tensor has it, and two runs do not touch."""
    r = random.Random(seed)
    shape = tuple(r.randrange(1, 5) for _ in range(r.randrange(4)))
    dims = tuple(r.sample(range(len(shape)), len(shape)))
    leaf = spec.spec(shape, " ".join("embed" for _ in shape), spec.ONES)
    target = DiskTensor(
        path="x", ranges=tuple((0, n) for n in shape), dims=dims, shape=tuple(shape[d] for d in dims), leaf=leaf
    )
    values: Tensor = torch.arange(leaf.numel).reshape(shape)
    stored = target.to_disk(values).reshape(-1)
    for box in cut(r, shape):
        part = target.part(box)
        assert part is not None
        runs = list(part.runs())
        found = torch.cat([stored[first : first + count] for first, count in runs])
        assert torch.equal(found, part.to_disk(values[slices(box)]).reshape(-1))
        assert all(a + count < b for (a, count), (b, _) in pairwise(runs))
