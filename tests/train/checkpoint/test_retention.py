"""Which checkpoints stay."""

import math
from pathlib import Path

import pytest

from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import single_mesh
from mmfn.train.checkpoint import Facts, Retention, read, remove_old, save
from mmfn.train.checkpoint.format import MANIFEST, step_of
from mmfn.train.checkpoint.retention import whole_in
from tests.train.checkpoint.cases import state_at

ALONE = Axis(name="world")


def test_the_newest_every_kth_and_the_best_stay() -> None:
    losses = dict.fromkeys(range(10, 100, 10)) | {20: 3.0, 40: 1.0, 60: 2.0, 70: math.nan}
    assert Retention(num_newest=2).stay(losses) == {80, 90}
    assert Retention(num_newest=1, every=30).stay(losses) == {30, 60, 90}
    assert Retention(num_newest=1, num_best=2).stay(losses) == {40, 60, 90}
    assert Retention(num_newest=20).stay(losses) == set(losses)
    best = Retention(num_newest=1, num_best=2)
    assert best.is_best(1.5, losses)
    assert not best.is_best(2.5, losses)
    assert not best.is_best(math.nan, {})
    assert not Retention(num_newest=1).is_best(0.0, {})


def test_what_need_not_stay_is_deleted(tmp_path: Path) -> None:
    """Losses are those that the manifests say, so that they outlive the run."""
    state = state_at("small", single_mesh(), 1)
    retention = Retention(num_newest=1, every=4, num_best=1)
    for step, loss in enumerate((3.0, 1.0, 2.0, None, 2.5, 1.5, None), start=1):
        save(tmp_path, state, Facts(step=step, loss=loss), ALONE)
        remove_old(tmp_path, retention, ALONE)
    assert read.names(tmp_path) == ["iter_0000007", "iter_0000004", "iter_0000002"]
    assert whole_in(tmp_path, retention) == {7: None, 4: None, 2: 1.0}


@pytest.mark.parametrize("num_best", [0, 1])
def test_a_save_looks_at_no_more_checkpoints_the_more_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_best: int
) -> None:
    """Those that stay for ever are not read behind each save; a damaged one still counts for none of the newest."""
    state, opened, known = state_at("small", single_mesh(), 1), list[str](), dict[int, float | None]()
    retention, real = Retention(num_newest=2, every=2, num_best=num_best), read.open_checkpoint

    def noted(folder: Path) -> read.Checkpoint:
        opened.append(folder.name)
        return real(folder)

    monkeypatch.setattr(read, "open_checkpoint", noted)
    for step in range(1, 10):
        save(tmp_path, state, Facts(step=step, loss=9.0 - step if step < 7 else None), ALONE)
        opened.clear()
        remove_old(tmp_path, retention, ALONE, known)
        assert len(opened) <= 3
    assert known.keys() <= {2, 4, 6, 8}
    assert [step_of(name) for name in read.names(tmp_path)] == [9, 8, 6, 4, 2]
    (tmp_path / "iter_0000009" / MANIFEST).unlink()
    save(tmp_path, state, Facts(step=11), ALONE)
    assert remove_old(tmp_path, retention, ALONE, known) == []
    assert [step_of(name) for name in read.names(tmp_path)] == [11, 9, 8, 6, 4, 2]
    assert whole_in(tmp_path, retention).keys() == ({11, 8, 6, 4, 2} if num_best else {11, 8})
