"""The run folder: which are refused, what is kept of an earlier run, and that nothing a run reads is overwritten."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mmfn.errors import UserError
from mmfn.train.config.load import Loaded, load_config
from mmfn.train.run import folder as run_folder

CONFIG = """\
model: {path: m}
data: {train: train.json, token_buckets: [64], tower_buckets: {vision: [32]}}
optimizer: {lr: 1e-3}
train: {steps: 10}
output: {overwrite: true}
"""


def loaded(tmp_path: Path, *overrides: str, output: Path | str | None = None) -> Loaded:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    return load_config(path, [*overrides, f"output.path={output or tmp_path / 'run'}"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that is complete."""
    folder = tmp_path / "run"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "config.json").write_text("old")
    for name in run_folder.RUN_FILES[:-1]:
        (folder / name).write_text("old")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "key", ["model.path", "model.adapter", "data.train", "data.eval", "data.root", "data.template"]
)
@pytest.mark.parametrize("entry", ["checkpoint", "checkpoint/part", "metrics.jsonl", "previous/checkpoint"])
def test_what_a_run_reads_is_not_overwritten(folder: Path, tmp_path: Path, key: str, entry: str) -> None:
    (folder / "previous").mkdir()
    with pytest.raises(ValueError, match=f"^{key} '.*{entry}' lies in output.path"):
        run_folder.check_output(loaded(tmp_path, f"{key}={folder / entry}"))
    (tmp_path / "link").symlink_to(folder / entry)
    with pytest.raises(ValueError, match=f"^{key} '.*link' lies in output.path"):
        run_folder.check_output(loaded(tmp_path, f"{key}={tmp_path / 'link'}"))
    (tmp_path / "alias").symlink_to(folder)
    with pytest.raises(ValueError, match=f"^{key} '.*{entry}' lies in output.path"):
        run_folder.check_output(loaded(tmp_path, f"{key}={folder / entry}", output=tmp_path / "alias"))


def test_the_config_of_the_run_itself_is_not_overwritten(folder: Path) -> None:
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.raises(ValueError, match=r"the config file '.*config.yaml' lies in output.path"):
        run_folder.check_output(load_config(folder / "config.yaml", [f"output.path={folder}"]))


def test_a_checkpoint_that_is_a_link(folder: Path, tmp_path: Path) -> None:
    (folder / "checkpoint").rename(tmp_path / "disk")
    (folder / "checkpoint").symlink_to(tmp_path / "disk")
    with pytest.raises(ValueError, match=r"model.path '.*checkpoint' lies in output.path"):
        run_folder.check_output(loaded(tmp_path, f"model.path={folder / 'checkpoint'}"))
    run_folder.check_output(loaded(tmp_path, f"model.path={tmp_path / 'disk'}"))
    assert run_folder.make_room(folder)
    run_folder.drop_previous(folder)
    assert names(folder) == []
    assert (tmp_path / "disk" / "config.json").read_text() == "old"


def test_what_a_killed_run_leaves_is_cleared(folder: Path, tmp_path: Path) -> None:
    (folder / ".checkpoint.abc" / "new").mkdir(parents=True)
    (folder / ".report.html.abc").write_text("half")
    run_folder.check_output(loaded(tmp_path))
    assert run_folder.make_room(folder)
    assert names(folder) == ["previous"]
    assert names(folder / "previous") == sorted(run_folder.RUN_FILES)
    (folder / ".checkpoints").write_text("not of a run")
    with pytest.raises(ValueError, match=r"holds '.checkpoints', which no run wrote"):
        run_folder.check_output(loaded(tmp_path))


def test_the_earlier_run_survives_runs_that_fail(folder: Path) -> None:
    for _ in range(2):
        assert run_folder.make_room(folder)
        assert names(folder) == ["previous"]
        assert (folder / "previous" / "checkpoint" / "config.json").read_text() == "old"
        (folder / "config.yaml").write_text("of a run that fails")
    run_folder.drop_previous(folder)
    assert names(folder) == ["config.yaml"]


@pytest.mark.parametrize("at", range(1, 7))
def test_a_kill_while_making_room_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    calls = []

    def killed(source: Path, target: Path, rename=os.rename) -> None:
        calls.append(source)
        if len(calls) == at:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        run_folder.make_room(folder)
    monkeypatch.undo()
    assert run_folder.make_room(folder)
    assert names(folder) == ["previous"]
    assert names(folder / "previous") == sorted(run_folder.RUN_FILES)


def test_a_folder_is_claimed_once_and_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def end_in(work: Callable[[], object]) -> None:
        with run_folder.claimed(folder):
            work()
            raise KeyboardInterrupt

    def try_again() -> None:
        with pytest.raises(UserError, match="another run is at work in"):
            end_in(list)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            end_in(try_again)
        assert not folder.exists()
    with pytest.raises(KeyboardInterrupt):
        end_in((folder / "metrics.jsonl").touch)
    assert names(folder) == ["metrics.jsonl"]


def test_where_there_are_no_locks_a_folder_is_claimed_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_folder.claimed(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_what_takes_the_place_of_a_file_is_durable_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may be durable before what is in the file: behind a loss of power that file would be empty."""
    path, durable, moved = tmp_path / "config.yaml", list[int](), list[bool]()
    path.write_text("old")
    fsync, rename = os.fsync, os.replace

    def noted_fsync(number: int) -> None:
        fsync(number)
        durable.append(os.fstat(number).st_ino)

    def noted_replace(source: str | Path, target: str | Path) -> None:
        moved.append(os.stat(source).st_ino in durable)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    run_folder.write_text(path, "new")
    assert path.read_text() == "new"
    assert moved == [True]


def test_a_finished_run_is_called_one(folder: Path, tmp_path: Path) -> None:
    """With `train.epochs` it is not known yet how many steps the settings ask for."""
    settings = ("output.overwrite=false", "train.steps=null", "train.epochs=2")
    with pytest.raises(UserError, match=r"is not empty: the run in it is finished; choose another or set output.over"):
        run_folder.check_output(loaded(tmp_path, *settings))
    (folder / "report.html").unlink()
    with pytest.raises(UserError, match=r"is not empty; choose another or set output.overwrite=true"):
        run_folder.check_output(loaded(tmp_path, *settings))


def test_a_new_folder_has_no_earlier_run(tmp_path: Path) -> None:
    assert not run_folder.make_room(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []
    run_folder.drop_previous(tmp_path / "a" / "b")


def test_places_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    cases = {
        "c.yaml": "is a file; give a folder",
        "c.yaml/x/y": "c.yaml' is a file; give a folder",
        "link": "is a link that leads nowhere",
        "link/x": "link' is a link that leads nowhere",
        "a" * 300: "is no usable path [(]File name too long",
        "new/" + "a" * 300 + "/x": "is no usable path [(]File name too long",
        "run/../c.yaml": "is a file; give a folder",
    }
    for path, expected in cases.items():
        with pytest.raises(ValueError, match=f"^output.path '.*{expected}"):
            run_folder.check_output(loaded(tmp_path, output=tmp_path / path))
    assert names(tmp_path) == ["c.yaml", "link"]
    with pytest.raises(ValueError, match=r"^output.path 'a.x00b' is no usable path"):
        run_folder.check_output(loaded(tmp_path, output='"a\\0b"'))
    assert run_folder.locate(str(tmp_path / "new" / ".." / "x")) == (tmp_path / "x").resolve()


def test_a_file_to_write(tmp_path: Path) -> None:
    run_folder.check_file("--out", str(tmp_path / "new.json"), "{")
    cases = {"": "is a folder", "no/a.json": "lies in a folder that does not exist", "a" * 300: "File name too long"}
    for path, expected in cases.items():
        with pytest.raises(ValueError, match=f"^--out '.*{expected}"):
            run_folder.check_file("--out", str(tmp_path / path), "{")
    with pytest.raises(ValueError, match=r"^--out '~/x.json' begins with '~'"):
        run_folder.check_file("--out", "~/x.json", "{")


@pytest.mark.parametrize("text", [None, "", "# min", "train: {steps: 1}"])
def test_what_a_command_did_not_write_is_not_replaced(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("# mine: 3")
    run_folder.check_file("--out", str(path), "# mine: ")
    if text is None:
        path.unlink()
        path.symlink_to(tmp_path / "gone")
    else:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"^--out '.*a.yaml' is there and was not written by this command"):
        run_folder.check_file("--out", str(path), "# mine: ")


def test_a_text_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a.txt").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"a.txt' cannot be written \(No space left on device\); make room or choose"):
        run_folder.write_text(tmp_path / "a.txt", "after")
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"


@pytest.mark.parametrize("key", ["output.path", "model.path", "data.train", "data.index_folder"])
def test_a_home_that_no_shell_expanded(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key} '~/x' begins with '~', which only a shell expands; write the folder"):
        run_folder.check_output(
            loaded(tmp_path, output="~/x") if key == "output.path" else loaded(tmp_path, f"{key}=~/x")
        )
    run_folder.check_output(loaded(tmp_path, output="./~x"))


def test_earlier_settings_are_in_the_order_of_steps(tmp_path: Path) -> None:
    """A step is looked for in the first of them that it is not behind, also among ten million steps."""
    ends = [4, 9_999_999, 10_000_000, 25_000_000]
    for end in ends:
        run_folder.keep_settings(tmp_path, end, f"{end}")
    assert list(run_folder.earlier_settings(tmp_path)) == ends
