"""A checkpoint that is damaged in any way is refused with a sentence that names leaf and file; an older is found."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import single_mesh
from mmfn.train.checkpoint import Checkpoint, fill_, newest, open_checkpoint, save, verify
from mmfn.train.checkpoint.format import LATEST, MANIFEST
from tests.train.checkpoint.cases import LAYOUTS, attempt, check_read_on, empty_state, facts_of, save_on, state_at

ALONE = Axis(name="world")
KIND = "small"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2 of one run, and of step 2 of another. Do not change them."""
    root = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        save_on(LAYOUTS["hsdp"], root / "run", KIND, step)
    save_on(LAYOUTS["hsdp"], root / "other", KIND, 2)
    return root


def files_of(checkpoint: Checkpoint) -> list[str]:
    return sorted(checkpoint.manifest.files)


def change(path: Path, edit: Callable[[bytearray], bytes | bytearray]) -> None:
    path.write_bytes(edit(bytearray(path.read_bytes())))


def flip(path: Path, place: int) -> None:
    def edit(data: bytearray) -> bytearray:
        data[place] ^= 0x10
        return data

    change(path, edit)


def zero(path: Path, start: int, stop: int) -> None:
    def edit(data: bytearray) -> bytearray:
        assert any(data[start:stop]), "something is lost"
        data[start:stop] = bytes(len(data[start:stop]))
        return data

    change(path, edit)


def damages(folder: Path, other: Path) -> Iterator[tuple[str, str, Damage]]:
    """(what is done, the file that must be named, how) for every file of a checkpoint."""
    manifest = open_checkpoint(folder).manifest
    names = sorted(manifest.files)
    for i, name in enumerate(names):
        size, head = manifest.files[name].num_bytes, manifest.files[name].head_bytes
        yield "missing", name, lambda d, n=name: (d / n).unlink()
        yield "a folder", name, lambda d, n=name: ((d / n).unlink(), (d / n).mkdir())
        for cut in (0, 7, head, (head + size) // 2, size - 1):
            yield f"cut at {cut}", name, lambda d, n=name, c=cut: change(d / n, lambda data: data[:c])
        yield "longer", name, lambda d, n=name: change(d / n, lambda data: data + b"\0")
        places = [0, 8, head // 3, head // 2, head - 1, head, size - 1, *range(head, size, (size - head) // 18)]
        for place in places:
            yield f"flipped at {place}", name, lambda d, n=name, p=place: flip(d / n, p)
        yield "half zeroed", name, lambda d, n=name, h=(head + size) // 2, s=size: zero(d / n, h, s)
        yield "zeroed", name, lambda d, n=name, s=size: zero(d / n, 0, s)
        yield "of another run", name, lambda d, n=name: shutil.copy(other / n, d / n)
        yield "swapped", name, lambda d, n=name, m=names[i - 1]: swap(d / n, d / m)
    size = (folder / MANIFEST).stat().st_size
    yield "missing", MANIFEST, lambda d: (d / MANIFEST).unlink()
    yield "of another step", MANIFEST, lambda d: shutil.copy(d.parent / "iter_0000001" / MANIFEST, d / MANIFEST)
    for cut in (0, 3, 16, 17, size // 2, size - 1):
        yield f"cut at {cut}", MANIFEST, lambda d, c=cut: change(d / MANIFEST, lambda data: data[:c])
    for place in (0, 4, 8, 14, 17, *range(20, size, size // 64)):
        yield f"flipped at {place}", MANIFEST, lambda d, p=place: flip(d / MANIFEST, p)
    for start in (0, 17, size // 2):
        yield f"zeroed from {start}", MANIFEST, lambda d, a=start: zero(d / MANIFEST, a, size)
    yield "JSON", MANIFEST, lambda d: (d / MANIFEST).write_text("{}")


def swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def resume(folder: Path) -> None:
    fill_(empty_state(KIND, single_mesh()), open_checkpoint(folder), ALONE)


def test_every_damage_is_refused(pristine: Path, tmp_path: Path) -> None:
    """By whoever resumes, by `verify` and, where it is thorough, by the search, which finds the one before."""
    source, run = pristine / "run", tmp_path / "run"
    cases = list(damages(source / "iter_0000002", pristine / "other" / "iter_0000002"))
    assert len(cases) >= 200
    leaves = open_checkpoint(source / "iter_0000002").manifest.leaves
    for what, name, damage in cases:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(source, run)
        folder = run / "iter_0000002"
        damage(folder)
        for said in (attempt(lambda: resume(folder)), attempt(lambda: verify(open_checkpoint(folder)))):  # noqa: B023
            assert said is not None, f"{name} {what} was taken"
            assert "\n" not in said
            assert what == "swapped" or str(folder / name) in said, said
            assert name == MANIFEST or any(leaf in said for leaf in leaves), said
        search = newest(run, ALONE, is_thorough=True)
        assert search.checkpoint is not None
        assert search.checkpoint.folder.name == "iter_0000001"
        assert len(search.skipped) == 1
        assert search.skipped[0].startswith("skipped iter_0000002: ")
    check_read_on(LAYOUTS["one"], run / "iter_0000001", KIND, 1)


def test_another_runs_manifest_fits_no_file(pristine: Path, tmp_path: Path) -> None:
    """It is sound, of that step and of files with these sizes: their headers tell."""
    run = shutil.copytree(pristine / "run", tmp_path / "run")
    shutil.copy(pristine / "other" / "iter_0000002" / MANIFEST, run / "iter_0000002" / MANIFEST)
    said = attempt(lambda: resume(run / "iter_0000002"))
    assert said is not None
    assert "is damaged or of another save: its header differs" in said


def test_the_search_says_what_it_skips(pristine: Path, tmp_path: Path) -> None:
    run = shutil.copytree(pristine / "run", tmp_path / "run")
    assert newest(run, ALONE).skipped == []
    (run / "iter_0000003").mkdir()
    (run / "iter_12").mkdir()
    (run / ".iter_0000004.writing-00").mkdir()
    (run / LATEST).write_text("9\n")
    search = newest(run, ALONE)
    assert search.checkpoint is not None
    assert search.checkpoint.manifest.facts == facts_of(2)
    first, second = search.skipped
    assert first == f"skipped iter_0000009: {LATEST} names it but there is no such folder"
    assert second.startswith("skipped iter_0000003: ")
    assert "manifest.msgpack cannot be read (No such file or directory)" in second
    assert newest(tmp_path / "nowhere", ALONE).checkpoint is None


def test_a_damaged_one_of_the_same_step_makes_room(pristine: Path, tmp_path: Path) -> None:
    """A run that has gone back may save that step again; what is whole is never replaced."""
    run = shutil.copytree(pristine / "run", tmp_path / "run")
    one, before = single_mesh(), (run / "iter_0000002" / MANIFEST).read_bytes()
    said = attempt(lambda: save(run, state_at(KIND, one, 5), facts_of(2), ALONE))
    assert said is not None
    assert "iter_0000002 is a whole checkpoint already" in said
    assert (run / "iter_0000002" / MANIFEST).read_bytes() == before
    flip(run / "iter_0000002" / "rank_00001.safetensors", -1)
    save(run, state_at(KIND, one, 2), facts_of(2), ALONE)
    check_read_on(LAYOUTS["dp"], run / "iter_0000002", KIND, 2)
    moved = [path.name for path in run.iterdir() if ".damaged-" in path.name]
    assert len(moved) == 1
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
