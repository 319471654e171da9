"""What a rank reads of a checkpoint: its shards, as if all had been read and cut, and nothing else."""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import mmfn
from mmfn import tree
from mmfn.interop import adapter
from mmfn.lora import add_adapters
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.planning.alike import recording_mesh
from mmfn.parallel.weights.sharding import local
from mmfn.train.build import shards
from mmfn.train.build.agreement import SAMPLE, sample_ranges
from mmfn.train.build.model import model_specs
from tests import tiny
from tests.interop import reads
from tests.parallel.allocated import peak_of
from tests.train.shard_cases import CASES, CPU, LAYOUTS, assert_same, config_of, cut, edit, load_on, refusals, save
from tests.train.whole_model import load_model


@pytest.mark.parametrize(("name", "disk", "layout"), CASES, ids=map(", ".join, CASES))
def test_slices_are_those_of_the_whole(name: str, disk: str, layout: str, tmp_path: Path) -> None:
    """Read in the dtype that is stored and in another."""
    for stored, dtype in ((torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.float64, "bfloat16")):
        config = config_of(save(tmp_path / str(stored), name, disk, stored), dtype)
        assert_same(load_on(LAYOUTS[layout], config), cut(LAYOUTS[layout], config))


@pytest.mark.parametrize(("name", "disk", "layout"), CASES, ids=map(", ".join, CASES))
def test_a_rank_reads_its_share(name: str, disk: str, layout: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Every byte of it once, and of other shards a sample at most, by which ranks see that they read the same."""
    config = config_of(save(tmp_path, name, disk))
    with monkeypatch.context() as patch:
        patch.setattr(shards, "sample_ranges", lambda shape: ((0, 0),) * len(shape))
        counts = reads.count(patch)
        models = load_on(LAYOUTS[layout], config)
    shares = [sum(local(leaf).nbytes for leaf in tree.leaves(model.params)) for model in models]
    assert [sum(counts[f"rank {rank}"].values()) for rank in range(4)] == shares
    whole = sum(leaf.nbytes for leaf in tree.leaves(load_model(config.model, 0).params))
    assert sum(shares) == whole * LAYOUTS[layout].replicate

    counts = reads.count(monkeypatch)
    load_on(LAYOUTS[layout], config)
    most = sum(4 * min(leaf.numel(), 2 * SAMPLE**2) for leaf in tree.leaves(models[0].params))
    assert all(0 < sum(counts[f"rank {r}"].values()) - shares[r] <= most for r in range(4))


@pytest.mark.parametrize("init", ["load", "random"])
@pytest.mark.parametrize("layout", ["one", "dp x ep"])
def test_of_what_a_checkpoint_overwrites_nothing_is_read(
    init: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor drawn; the leaves are those that would have been, but for their values."""
    config = config_of(save(tmp_path, "moe", dtype=torch.bfloat16), "bfloat16", model={"init": init}, lora={"rank": 3})
    counts = reads.count(monkeypatch)

    def load(mesh: Mesh, is_restored: bool) -> mmfn.Model:
        return shards.load_shards(config, Place(device=CPU, mesh=mesh, host=mesh), is_restored=is_restored)

    sizes = {"one": Layout(), **LAYOUTS}[layout]
    blank = virtual(sizes, lambda mesh: load(mesh, True))
    assert not counts
    for one, other in zip(blank, virtual(sizes, lambda mesh: load(mesh, False)), strict=True):
        assert bool(counts) == (init == "load")
        for (path, leaf), read in zip(tree.items(one.params), tree.leaves(other.params), strict=True):
            assert (type(leaf), leaf.dtype, leaf.shape) == (type(read), read.dtype, read.shape), path
            assert local(leaf).stride() == local(read).stride(), path
            assert not local(leaf).any(), path


@pytest.mark.parametrize("init", ["load", "random"])
def test_adapters_are_drawn_and_read_beside_shards(init: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "moe")
    drawn = config_of(folder, "bfloat16", model={"init": init}, lora={"rank": 3})
    assert_same(load_on(LAYOUTS["dp x ep"], drawn), cut(LAYOUTS["dp x ep"], drawn))

    model = tiny.model_of("moe")
    specs = tiny.TRAINED["lora"](model.family, model.cfg)
    adapted = replace(model, params=tiny.with_adapters(model.params, specs))
    adapter.save(tmp_path / "adapter", adapted, specs)
    read = config_of(folder, "float32", model={"init": init, "adapter": str(tmp_path / "adapter")})
    models = load_on(LAYOUTS["dp x ep"], read)
    assert_same(models, cut(LAYOUTS["dp x ep"], read))
    own = dict(tree.items(models[0].params))
    assert any(
        "/lora/" in path and local(leaf).count_nonzero() == leaf.to_local().numel() for path, leaf in own.items()
    )


@pytest.mark.parametrize("name", ["dense", "glm"])
def test_random_weights_are_those_of_one_process(name: str, tmp_path: Path) -> None:
    config = config_of(save(tmp_path, name), "bfloat16", model={"init": "random"})
    assert_same(load_on(LAYOUTS["dp"], config), cut(LAYOUTS["dp"], config))


def test_one_process_has_whole_parameters(tmp_path: Path) -> None:
    config = config_of(save(tmp_path, "glm"), "bfloat16", lora={"rank": 2})
    (model,) = load_on(Layout(), config)
    base = mmfn.load_hf(tmp_path, dtype=torch.bfloat16)
    want = add_adapters(base.params, model_specs(config, model.family, model.cfg), 5)
    for (path, leaf), other in zip(tree.items(model.params), tree.leaves(want), strict=True):
        assert not isinstance(leaf, DTensor)
        assert leaf.dtype == other.dtype
        assert torch.equal(leaf, other), path


@pytest.mark.parametrize("init", ["load", "random"])
@pytest.mark.parametrize("disk", ["hub", "transformers"])
def test_memory_is_the_share_and_one_leaf(disk: str, init: str, tmp_path: Path) -> None:
    """Of a leaf that is read, nothing but the share; the file is mapped, which the allocator's events count."""
    config = config_of(save(tmp_path, "glm", disk), model={"init": init})
    mesh = recording_mesh(LAYOUTS["dp x ep"], 0)
    loaded: list[mmfn.Model] = []
    peak = peak_of(lambda: loaded.append(shards.load_shards(config, Place(device=CPU, mesh=mesh, host=mesh))))
    leaves = tree.leaves(loaded[0].params)
    share = sum(local(leaf).nbytes for leaf in leaves)
    samples = 4 * sum(prod(b - a for a, b in sample_ranges(leaf.shape)) for leaf in leaves)
    largest = 4 * max(leaf.numel() for leaf in leaves)
    beside = largest if init == "random" else (tmp_path / "model.safetensors").stat().st_size
    assert share <= peak <= share + samples + beside + 2**12
    assert share + samples + 2**12 < 4 * sum(leaf.numel() for leaf in leaves)


def first(tensors: dict[str, Tensor]) -> str:
    return min(name for name in tensors if ".experts." in name)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


FAULTS = {
    "missing": lambda folder: edit(folder, lambda tensors: tensors.pop(first(tensors))),
    "extra": lambda folder: edit(folder, lambda tensors: tensors.update(more=torch.ones(1))),
    "shape": lambda folder: edit(folder, lambda tensors: tensors.update({first(tensors): torch.ones(2, 2)})),
    "dtype": lambda folder: edit(
        folder, lambda tensors: tensors.update({first(tensors): tensors[first(tensors)].int()})
    ),
    "truncated": truncate,
}


@pytest.mark.parametrize("disk", ["hub", "transformers"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_alike_on_all_ranks(fault: str, disk: str, tmp_path: Path) -> None:
    """With the sentence of one process; also where one rank alone has that file."""
    good, bad = config_of(save(tmp_path / "good", "glm", disk)), config_of(save(tmp_path / "bad", "glm", disk))
    FAULTS[fault](tmp_path / "bad")
    with pytest.raises(ValueError, match="bad") as error:
        mmfn.load_hf(tmp_path / "bad")
    assert refusals(LAYOUTS["dp x ep"], bad) == [str(error.value)] * 4
    assert refusals(LAYOUTS["dp x ep"], good, good, bad) == [str(error.value)] * 4


@pytest.mark.parametrize("row", [0, -1])
def test_a_copy_that_differs_in_one_shard_is_refused_on_all_ranks(row: int, tmp_path: Path) -> None:
    config = config_of(save(tmp_path, "dense"))

    def tie(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()

    edit(tmp_path, tie)
    assert_same(load_on(LAYOUTS["dp"], config), cut(LAYOUTS["dp"], config))
    edit(tmp_path, lambda tensors: tensors["lm_head.weight"][row].add_(1))
    with pytest.raises(ValueError, match=r"lm_head.weight.*although the config ties them") as error:
        mmfn.load_hf(tmp_path)
    assert refusals(LAYOUTS["dp"], config) == [str(error.value)] * 4


def test_ranks_with_other_weights_are_refused(tmp_path: Path) -> None:
    one, other = config_of(save(tmp_path / "one", "glm")), config_of(save(tmp_path / "other", "glm", "transformers"))
    assert_same(load_on(LAYOUTS["dp"], one, other), cut(LAYOUTS["dp"], one))  # the same in another layout
    edit(tmp_path / "other", lambda tensors: [tensor.mul_(1.01) for tensor in tensors.values()])
    said = refusals(LAYOUTS["dp"], one, one, one, other)
    assert len(set(said)) == 1
    assert said[0].startswith("rank 3 has weights (model.path, model.adapter) with the content '")


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((), ()),
        ((0,), ((0, 0),)),
        ((17,), ((0, 16),)),
        ((100, 3), ((42, 58), (0, 3))),
        ((1, 5, 20, 18), ((0, 1), (2, 3), (2, 18), (1, 17))),
    ],
)
def test_samples_lie_in_the_middle(shape: tuple[int, ...], want: tuple[tuple[int, int], ...]) -> None:
    assert sample_ranges(shape) == want
