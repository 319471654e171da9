"""What ranks write of a model: byte for byte the files of one process that has all of it, whatever the layout."""

import threading
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmfn
from mmfn import lora, tree
from mmfn.interop import adapter, export, weight_files
from mmfn.interop.export import Contents
from mmfn.interop.hf import checkpoint_contents
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import run_virtual, virtual
from mmfn.parallel.weights.sharding import shard_params
from mmfn.train.run import save
from mmfn.tree import Tree
from tests import tiny
from tests.interop import whole_export

CPU = torch.device("cpu")
LAYOUTS = {
    "dp": Layout(dp=3),
    "ep": Layout(dp=4, ep=4),
    "dp x ep": Layout(dp=4, ep=2),
    "hsdp x ep": Layout(replicate=2, dp=2, ep=2),
    "cp": Layout(dp=2, cp=2, ep=2),
}
NAMES = [name for name in tiny.TINY if name != "toy"]
CASES = [
    *((name, "hub", layout) for name in NAMES for layout in ("dp", "hsdp x ep")),
    *((name, "transformers", layout) for name in ("moe", "glm", "delta_moe") for layout in ("ep", "dp x ep", "cp")),
    *((name, "hub", layout) for name in ("moe", "omni") for layout in ("ep", "dp x ep", "cp")),
]


def model_of(name: str, dtype: torch.dtype) -> mmfn.Model:
    """With what declares a wider dtype in that."""
    model = tiny.model_of(name)
    declared = dict(tree.items(model.family.specs(model.cfg)))
    return replace(
        model,
        params=tree.map_with_path(lambda path, leaf: leaf.to(declared[path].dtype or dtype), model.params),
    )


def write(folder: Path, what: Contents, params: Tree, specs: Tree, layout: Layout) -> None:
    """What a run does at its end, on ranks in one process."""

    def rank(mesh: Mesh) -> None:
        world, own = mesh["world"], shard_params(params, specs, mesh)
        export.save(
            folder,
            what,
            save.shard_pieces(own, what, Place(device=CPU, mesh=mesh, host=mesh)),
            save.writers_of(world, folder),
        )

    virtual(layout, rank)


@pytest.mark.parametrize(("name", "disk", "layout"), CASES, ids=map(", ".join, CASES))
def test_ranks_write_the_files_of_one_process(name: str, disk: str, layout: str, tmp_path: Path) -> None:
    for dtype, max_shard_bytes in ((torch.bfloat16, 5_000_000_000), (torch.float32, 11_000)):
        model = model_of(name, dtype)
        what = checkpoint_contents(model, layout=disk, max_shard_bytes=max_shard_bytes)
        write(tmp_path / f"{dtype} out", what, model.params, model.family.specs(model.cfg), LAYOUTS[layout])
        whole_export.write(tmp_path / f"{dtype} want", whole_export.tensors_of(model, disk), max_shard_bytes)
        want = whole_export.content(tmp_path / f"{dtype} want")
        assert whole_export.content(tmp_path / f"{dtype} out") == want
    again = mmfn.load_hf(tmp_path / f"{dtype} out")
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(again.params), tree.leaves(model.params), strict=True))


def assert_merged(folder: Path, merged: mmfn.Model, adapters: Collection[str]) -> None:
    """The bits of the whole where there is no adapter. A product of some rows may be added up in another order than
    that of all, so a sum in float32 differs by its roundings, of which a narrower weight shows one at most.
    """
    found, want = load_file(folder / "model.safetensors"), whole_export.tensors_of(merged, "hub")
    specs = merged.family.specs(merged.cfg)
    paths = {name: one.path for name, one in merged.family.key_map(merged.cfg).disk_tensors(specs).items()}
    assert found.keys() == want.keys()
    for name, value in want.items():
        if paths[name] in adapters:
            step = torch.finfo(value.dtype).eps
            torch.testing.assert_close(found[name], value, rtol=step, atol=4 * torch.finfo(torch.float32).eps)
        else:
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dense", "moe", "glm"])
def test_adapters_are_merged_and_written_by_slices(name: str, layout: str, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = model_of(name, dtype)
        specs = tiny.TRAINED["lora"](model.family, model.cfg)
        adapted = replace(model, params=tiny.with_adapters(model.params, specs))
        plain = replace(model, params=lora.without_adapters(adapted.params))
        write(tmp_path / f"{dtype} out", checkpoint_contents(plain), adapted.params, specs, LAYOUTS[layout])
        merged = replace(model, params=lora.merge(adapted.params))
        assert_merged(tmp_path / f"{dtype} out", merged, lora.adapters_of(adapted.params))
        if name == "glm":  # peft adapts each of its experts alone
            continue
        write(tmp_path / f"{dtype} own", adapter.contents(adapted, specs), adapted.params, specs, LAYOUTS[layout])
        adapter.save(tmp_path / f"{dtype} one", adapted, specs)
        found, want = (
            {path.name: path.read_bytes() for path in (tmp_path / f"{dtype} {kind}").iterdir()}
            for kind in ("own", "one")
        )
        assert found == want


@pytest.mark.parametrize(("name", "layout"), [("moe", "dp x ep"), ("moe", "hsdp x ep"), ("dense", "dp")])
def test_a_rank_writes_its_share_in_long_runs(name: str, layout: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Every byte once; never more than a leaf's share is exchanged, and copies are written in turns."""
    counts: dict[int, list[int]] = {}
    model, sizes = model_of(name, torch.float32), LAYOUTS[layout]
    what, specs = checkpoint_contents(model), model.family.specs(model.cfg)
    folder = tmp_path / "out"

    def rank(mesh: Mesh) -> None:
        world, own = mesh["world"], shard_params(model.params, specs, mesh)
        written = counts.setdefault(world.index, [])

        def count(piece: export.Piece) -> export.Piece:
            written.append(piece.values.nbytes)
            return piece

        pieces = map(count, save.shard_pieces(own, what, Place(device=CPU, mesh=mesh, host=mesh)))
        export.save(folder, what, pieces, save.writers_of(world, folder))

    ran = run_virtual(sizes, rank)
    total = sum(leaf.nbytes for leaf in tree.leaves(model.params))
    assert sum(map(sum, counts.values())) == total
    least, most = min(map(sum, counts.values())), max(map(sum, counts.values()))
    assert most < 1.6 * total / sizes.world
    assert least > 0.5 * total / sizes.world
    exchanged = [call for call in ran.calls[0] if call.site == "export"]
    assert bool(exchanged) == (name == "moe" and sizes.edp > 1)  # stored transposed


def test_ranks_need_one_folder_in_common(tmp_path: Path) -> None:
    model = model_of("dense", torch.float32)

    def elsewhere(work: Any) -> list[Any]:
        return [str(tmp_path / "nowhere"), work()]

    writers = export.Writers(index=1, size=2, on_all=elsewhere)
    with pytest.raises(ValueError, match=r"nowhere, which the first rank has made, is not there; all ranks need one"):
        export.save(tmp_path / "out", checkpoint_contents(model), [], writers)


@pytest.mark.parametrize(("bad", "fault"), [(0, "full"), (2, "full"), (2, "elsewhere")])
def test_what_one_rank_cannot_write_ends_all(bad: int, fault: str, tmp_path: Path, monkeypatch: Any) -> None:
    """While others wait for its part of an adapter; the earlier export stays, and nothing else does."""
    model = model_of("moe", torch.float32)
    specs = tiny.TRAINED["lora"](model.family, model.cfg)
    adapted = replace(model, params=tiny.with_adapters(model.params, specs))
    what = checkpoint_contents(replace(model, params=lora.without_adapters(adapted.params)))
    folder = tmp_path / "out"
    mmfn.save_hf(folder, model)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pwrite = weight_files.os.pwrite

    def full(number: int, data: Any, offset: int) -> int:
        if rank_here() == bad:
            raise OSError(28, "No space left on device")
        return pwrite(number, data, offset)

    is_dir = Path.is_dir

    def elsewhere(path: Path) -> bool:
        return is_dir(path) and not (path.name == "new" and rank_here() == bad)

    if fault == "full":
        monkeypatch.setattr(weight_files.os, "pwrite", full)
    else:
        monkeypatch.setattr(Path, "is_dir", elsewhere)

    def rank(mesh: Mesh) -> str:
        world, own = mesh["world"], shard_params(adapted.params, specs, mesh)
        with pytest.raises(ValueError, match="writing") as error:
            export.save(
                folder,
                what,
                save.shard_pieces(own, what, Place(device=CPU, mesh=mesh, host=mesh)),
                save.writers_of(world, folder),
            )
        return str(error.value)

    (said,) = set(virtual(LAYOUTS["dp x ep"], rank))
    reason = {
        "full": f"No space left on device (model.safetensors) ({folder})",
        "elsewhere": "new, which the first rank has made, is not there; all ranks need one folder in common",
    }
    assert said.startswith(f"writing {folder} failed on rank {bad}: ")
    assert said.endswith(reason[fault])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def rank_here() -> int:
    """The rank whose thread this is."""
    return int(threading.current_thread().name.removeprefix("rank "))
