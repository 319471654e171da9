"""What one mesh writes, any other reads, bit for bit; every element is written once; what does not fit is refused."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mmfn import tree
from mmfn.models.disk_tensor import slices
from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Layout, Mesh, distributed_mesh, single_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.program import Transform
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.weights.sharding import local, whole
from mmfn.train.checkpoint import Facts, fill_, format, newest, open_checkpoint, read, save, verify, write
from mmfn.train.checkpoint.estimate import describe_sizes, sizes_of
from mmfn.train.checkpoint.write import part_of
from tests.parallel.conformance import Cell, prepared, spread
from tests.parallel.ranks import run_ranks
from tests.train.checkpoint.cases import (
    KINDS,
    LAYOUTS,
    attempt,
    check_read_on,
    empty_state,
    facts_of,
    same_bits,
    save_on,
    state_at,
    values_of,
)
from tests.train.hosted_cases import MESH

ALONE = Axis(name="world")
READERS = {"one": "ep", "dp": "odd", "ep": "all ep", "all ep": "hsdp ep", "hsdp": "cp", "hsdp ep": "dp", "cp": "one"}


@pytest.mark.parametrize("writer", READERS)
def test_any_mesh_reads_what_another_wrote(tmp_path: Path, writer: str) -> None:
    folder = save_on(LAYOUTS[writer], tmp_path, "moe", 3)
    for reader in (writer, READERS[writer]):
        check_read_on(LAYOUTS[reader], folder, "moe", 3)


@pytest.mark.slow
@pytest.mark.parametrize("writer", LAYOUTS)
@pytest.mark.parametrize("reader", LAYOUTS)
def test_every_mesh_reads_every_other(tmp_path: Path, writer: str, reader: str) -> None:
    check_read_on(LAYOUTS[reader], save_on(LAYOUTS[writer], tmp_path, "moe", 3), "moe", 3)


def test_a_leaf_of_one_element_may_have_any_stride(tmp_path: Path) -> None:
    """Torch calls it contiguous."""
    state, empty = ({"x": torch.full((4,), value)[::3][:1]} for value in (5.0, 0.0))
    assert state["x"].stride() == (3,)
    fill_(empty, open_checkpoint(save(tmp_path, state, facts_of(1), ALONE)), ALONE)
    assert empty["x"].tolist() == [5.0]


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_all_kinds(tmp_path: Path, kind: str) -> None:
    folder = save_on(LAYOUTS["ep"], tmp_path, kind, 12)
    check_read_on(LAYOUTS["one"], folder, kind, 12)
    check_read_on(LAYOUTS["hsdp"], folder, kind, 12)


def test_small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of 16 bytes every slice has many, and the reader takes rows one by one where blocks lie between."""
    for module in (format, read, write):
        monkeypatch.setattr(module, "BLOCK", 16)
    for writer, reader in (("dp", "ep"), ("ep", "all ep"), ("all ep", "odd"), ("one", "hsdp ep")):
        folder = save_on(LAYOUTS[writer], tmp_path / writer.replace(" ", "_"), "moe", 4)
        verify(open_checkpoint(folder))
        check_read_on(LAYOUTS[reader], folder, "moe", 4)


def test_a_rank_reads_its_own_blocks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its own slices, one span each here, a rank reads the header and less than a block at each of their ends.

    A file is opened once.
    """
    for module in (format, read, write):
        monkeypatch.setattr(module, "BLOCK", 64)
    checkpoint = open_checkpoint(save_on(LAYOUTS["one"], tmp_path, "moe", 4))
    mesh = virtual(LAYOUTS["all ep"], lambda mesh: mesh)[1]
    state = empty_state("moe", mesh)
    opened: list[Path] = []
    counts: list[int] = []
    real_open, real_read = os.open, os.preadv

    def count_open(path: Path, flags: int) -> int:
        opened.append(path)
        return real_open(path, flags)

    def count_read(file: int, views: list[memoryview], offset: int) -> int:
        counts.append(real_read(file, views, offset))
        return counts[-1]

    monkeypatch.setattr(os, "open", count_open)
    monkeypatch.setattr(os, "preadv", count_read)
    read._fill(state, checkpoint, mesh["world"], is_part=False)
    monkeypatch.undo()
    own = sum(local(leaf).numel() * leaf.dtype.itemsize for leaf in tree.leaves(state))
    (file,) = checkpoint.manifest.files.values()
    assert opened == [tmp_path / "iter_0000004" / "rank_00000.safetensors"]
    assert own < 0.3 * (file.num_bytes - file.head_bytes)
    assert own <= sum(counts) - file.head_bytes <= own + 2 * 64 * len(tree.leaves(state))


def test_a_step_of_a_model_goes_on_elsewhere(tmp_path: Path) -> None:
    """The state behind a real step, saved by four ranks, is on two, and on one, what it was."""
    cell = Cell(layout=LAYOUTS["ep"], name="", transforms=MESH, family="moe", batch="text")

    def train(mesh: Mesh) -> dict[str, Any]:
        step, state, batch = prepared(cell, mesh)
        state, _ = step(state, [batch])
        save(tmp_path, state, facts_of(1), mesh["world"])
        return {path: whole(leaf, mesh).clone() for path, leaf in tree.items(state)}

    expected = virtual(cell.layout, train)[0]
    for name in ("one", "odd", "hsdp"):
        other = replace(cell, layout=LAYOUTS[name], transforms=MESH)

        def resume(mesh: Mesh, other: Cell = other) -> dict[str, Any]:
            _, state, _ = prepared(other, mesh)
            search = newest(tmp_path, mesh["world"])
            assert search.checkpoint is not None
            fill_(state, search.checkpoint, mesh["world"])
            return {path: whole(leaf, mesh) for path, leaf in tree.items(state)}

        for found in virtual(other.layout, resume):
            assert found.keys() == expected.keys()
            assert all(same_bits(found[path], expected[path]) for path in expected)


def stage(layout: Layout, *transforms: Transform) -> Cell:
    """Steps of a model with experts, in float64."""
    pack = {"segment_multiple": segment_multiple("gather", layout)} if layout.cp > 1 else {}
    return Cell(layout=layout, name="", transforms=(data_parallel(), *transforms), family="moe", pack=pack)


STAGES = (
    stage(Layout(dp=4)),
    stage(Layout(dp=2, ep=2), expert_parallel()),
    stage(Layout(cp=2), spread("gather", "moe")),
    Cell(layout=Layout(), name="", transforms=(), family="moe"),
)


def test_the_mesh_may_change_again_and_again(tmp_path: Path) -> None:
    """dp 4, dp 2 x ep 2, cp 2, one rank, two steps on each: all of the state is that of one device, to 1e-12."""

    def go_on(cell: Cell, mesh: Mesh, root: Path, num_steps: int) -> dict[str, Any]:
        step, state, batch = prepared(cell, mesh)
        search = newest(root, mesh["world"])
        taken = 0
        if search.checkpoint is not None:
            fill_(state, search.checkpoint, mesh["world"])
            taken = search.checkpoint.manifest.facts.step
        for _ in range(num_steps):
            state, _ = step(state, [batch])
        save(root, state, Facts(step=taken + num_steps), mesh["world"])
        return {path: whole(leaf, mesh).clone() for path, leaf in tree.items(state)}

    for cell in STAGES:
        found = virtual(cell.layout, lambda mesh, cell=cell: go_on(cell, mesh, tmp_path / "stages", 2))[0]
    expected = go_on(STAGES[-1], single_mesh(), tmp_path / "one", 2 * len(STAGES))
    assert found.keys() == expected.keys()
    assert found["step"] == 2 * len(STAGES)
    for path, values in expected.items():
        assert values.dtype in (torch.float64, torch.float32, torch.int64, torch.bool), path
        scale = max(1.0, values.abs().max().item()) if values.numel() else 1.0
        assert torch.allclose(found[path].double(), values.double(), rtol=0, atol=1e-12 * scale), path
    start = prepared(STAGES[-1], single_mesh())[1]["params"]["text"]["embed"]["weight"]
    assert not torch.allclose(expected["params/text/embed/weight"], start, atol=1e-3), "the steps do something"


def real_rank(root: str) -> list[str]:
    mesh = distributed_mesh(LAYOUTS["hsdp"])
    folder = save(Path(root), state_at("moe", mesh, 6), facts_of(6), mesh["world"])
    state, expected = empty_state("moe", mesh), state_at("moe", mesh, 6)
    search = newest(Path(root), mesh["world"], is_thorough=True)
    assert search.checkpoint is not None
    assert search.checkpoint.folder == folder
    fill_(state, search.checkpoint, mesh["world"])
    pairs = zip(tree.items(state), tree.leaves(expected), strict=True)
    return [path for (path, leaf), other in pairs if not same_bits(local(leaf), local(other))]


@pytest.mark.dist
def test_real_ranks(tmp_path: Path) -> None:
    assert run_ranks(4, real_rank, str(tmp_path)) == [[]] * 4
    check_read_on(LAYOUTS["odd"], tmp_path / "iter_0000006", "moe", 6)


def test_copies_are_written_once_and_by_turns(tmp_path: Path) -> None:
    parts = virtual(LAYOUTS["hsdp"], lambda mesh: part_of(state_at("moe", mesh, 1), mesh["world"]))
    sizes = [sum(x.numel() * x.itemsize for x in part.pieces.values()) for part in parts]
    whole_bytes = sum(values_bytes(leaf.dtype, leaf.shape) for leaf in parts[0].leaves.values())
    assert sum(sizes) == whole_bytes
    assert max(sizes) < 1.2 * whole_bytes / 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_it_takes_is_known_before(tmp_path: Path, layout: str) -> None:
    """From a state alone, of every rank: the sizes of the files are these and their headers'."""
    manifest = open_checkpoint(save_on(LAYOUTS[layout], tmp_path, "omni", 1)).manifest
    for sizes in virtual(LAYOUTS[layout], lambda mesh: sizes_of(tree.items(state_at("omni", mesh, 1)), mesh["world"])):
        files = {format.file_name(rank): size for rank, size in enumerate(sizes) if size}
        assert files == {name: file.num_bytes - file.head_bytes for name, file in manifest.files.items()}
        assert describe_sizes(sizes).startswith("checkpoint: ")


def values_bytes(code: str, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * format.DTYPES[code].itemsize


def test_files_are_safetensors_and_the_manifest_says_it_all(tmp_path: Path) -> None:
    folder = save_on(LAYOUTS["ep"], tmp_path, "moe", 7)
    manifest = open_checkpoint(folder).manifest
    assert manifest.facts == facts_of(7)
    assert manifest.world == 4
    assert set(manifest.versions) == {"mmfn", "torch", "python"}
    assert (tmp_path / format.LATEST).read_text() == "7\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000007", format.LATEST]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*manifest.files, format.MANIFEST])
    seen = set()
    for name in manifest.files:
        with safe_open(folder / name, framework="pt") as file:
            assert file.metadata().items() >= {"format": "pt", "save": manifest.id}.items()
            for path in format.paths_in(manifest, name):
                leaf, rank = manifest.leaves[path], int(name[5:10])
                expected = values_of(path, 7, leaf.shape, format.DTYPES[leaf.dtype])
                assert same_bits(file.get_tensor(path), expected[slices(leaf.cut.ranges(leaf.shape, rank))])
                seen.add(path)
            assert sorted(format.paths_in(manifest, name)) == sorted(file.keys())
    assert seen == set(manifest.leaves)
    assert format.loads(format.dumps(manifest)) == manifest


def test_leaves_must_be_the_same(tmp_path: Path) -> None:
    one = single_mesh()
    folder = save(tmp_path, state_at("small", one, 2), Facts(step=2), ALONE)
    checkpoint = open_checkpoint(folder)
    more = empty_state("small", one) | {"stp": torch.zeros(())}
    assert "it has no leaf stp, but step; resume with" in attempt(lambda: fill_(more, checkpoint, ALONE))
    less = empty_state("small", one)
    del less["step"]
    assert "its leaf step has no place in the run" in attempt(lambda: fill_(less, checkpoint, ALONE))
    other = empty_state("small", one) | {"step": torch.zeros(3)}
    assert "its step has the shape [] but the run's [3]; resume" in attempt(lambda: fill_(other, checkpoint, ALONE))
    other = empty_state("small", one) | {"step": torch.zeros(())}
    assert "its step is I64 but the run's is F32; resume" in attempt(lambda: fill_(other, checkpoint, ALONE))


def test_dtypes_that_no_file_holds(tmp_path: Path) -> None:
    said = attempt(lambda: save(tmp_path, {"x": torch.zeros(2, dtype=torch.complex64)}, Facts(step=1), ALONE))
    assert "x has dtype torch.complex64" in said
    odd = {"a": torch.tensor([True, False]), "b": torch.zeros(0, 3), "c": torch.arange(6).view(2, 3).mT}
    folder = save(tmp_path, odd, Facts(step=1), ALONE)
    found = {"a": torch.tensor([False, False]), "b": torch.zeros(0, 3), "c": torch.zeros(2, 3, dtype=torch.int64).mT}
    fill_(found, open_checkpoint(folder), ALONE)
    assert all(torch.equal(found[name], odd[name]) for name in odd)
