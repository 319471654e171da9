"""A checkpoint appears as a whole: at every moment, and whatever fails, there is the new one or the one before."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mmfn
from mmfn import tree
from mmfn.interop import export, folder_swap, weight_files
from tests import oracles


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as transformers writes it, in one file."""
    return oracles.save(oracles.build(oracles.config()), tmp_path / "hub")


def assert_params_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def test_the_target_is_complete_or_untouched(folder, tmp_path, monkeypatch):
    model = mmfn.load_hf(folder)
    target = tmp_path / "out"
    mmfn.save_hf(target, model)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    with pytest.raises(ValueError, match="is not an empty folder; choose another or pass overwrite=True"):
        mmfn.save_hf(target, model)
    changed = replace(model, params=tree.map(lambda p: p + 1, model.params))

    def fail(*_args):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(weight_files.os, "pwrite", fail)
    with pytest.raises(OSError, match=r"disk full \(model.safetensors\): '.*out'"):
        mmfn.save_hf(target, changed, overwrite=True)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    monkeypatch.undo()
    mmfn.save_hf(target, changed, max_shard_bytes=15_000, overwrite=True)
    assert not (target / "model.safetensors").exists()
    assert_params_equal(mmfn.load_hf(target).params, changed.params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "out"]  # no temporary folder is left


def test_a_full_disk_shows_before_a_byte_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"0.00 GiB are needed but 0.00 GiB free: '.*out'") as error:
        mmfn.save_hf(tmp_path / "out", mmfn.load_hf(folder))
    assert error.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["hub"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_there_is_a_checkpoint_at_every_moment(can_exchange, folder, tmp_path, monkeypatch):
    """Names are exchanged, where the system can; all that gets a name was made durable before."""
    target, synced = tmp_path / "out", set()
    model = mmfn.load_hf(folder)
    mmfn.save_hf(target, model)
    exchange, fsync, rename = folder_swap.exchange, os.fsync, os.rename

    def note(number):
        synced.add(Path(os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def swapped(a, b):
        assert {a, *a.iterdir()} <= synced
        assert target not in synced
        return can_exchange and exchange(a, b)

    def renamed(a, b):
        assert not can_exchange
        rename(a, b)

    monkeypatch.setattr(folder_swap, "exchange", swapped)
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", renamed)
    changed = replace(model, params=tree.map(lambda p: p + 1, model.params))
    mmfn.save_hf(target, changed, overwrite=True)
    assert target.parent in synced
    assert_params_equal(mmfn.load_hf(target).params, changed.params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "out"]


@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupt_while_publishing_keeps_the_old_checkpoint(at, folder, tmp_path, monkeypatch):
    model = mmfn.load_hf(folder)
    target = tmp_path / "out"
    mmfn.save_hf(target, model)
    renames = []

    def interrupted(source, destination, rename=os.rename):
        renames.append(source)
        if len(renames) == at:
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(folder_swap, "exchange", lambda a, b: False)
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mmfn.save_hf(target, replace(model, params=tree.map(lambda p: p + 1, model.params)), overwrite=True)
    monkeypatch.undo()
    assert_params_equal(mmfn.load_hf(target).params, model.params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "out"]


def test_links_are_followed(folder, tmp_path):
    model = mmfn.load_hf(folder)
    changed = replace(model, params=tree.map(lambda p: p + 1, model.params))
    disk = tmp_path / "disk"
    for name in ("empty", "absent"):
        if name == "empty":
            (disk / name).mkdir(parents=True)
        link = tmp_path / name
        link.symlink_to(disk / name)
        for written in (model, changed):
            mmfn.save_hf(link, written, overwrite=True)
            assert link.is_symlink()
            assert_params_equal(mmfn.load_hf(disk / name).params, written.params)
    mmfn.save_hf(tmp_path / "copy", mmfn.load_hf(tmp_path / "absent"), assets=tmp_path / "absent")
    assert_params_equal(mmfn.load_hf(tmp_path / "copy").params, changed.params)


def test_only_a_checkpoint_is_overwritten(folder, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"work is no checkpoint \(no config.json\) and stays as it is"):
        mmfn.save_hf(tmp_path / "work", mmfn.load_hf(folder), overwrite=True)
    assert (tmp_path / "work" / "notes.txt").read_text() == "keep"
