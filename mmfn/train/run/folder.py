"""The run folder: where it may be, what a run writes there, and how an earlier run is kept until a new one is complete.

`check_output` writes nothing. `make_room` and `drop_previous` only ever touch entries that a run wrote.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmfn.errors import UserError
from mmfn.train.checkpoint.read import names as checkpoint_names
from mmfn.train.config.load import Loaded, Settings

SETTINGS = "config.yaml"  # the first that a run writes
STATE = "state"  # checkpoints of training
EARLIER = "earlier"  # settings that steps before were taken with, where the run went on with others
RESULTS = ("eval.json", "report.html", "adapter", "checkpoint")  # what is written behind the last step
TRACKERS = ("tensorboard", "wandb")  # what is written beside metrics.jsonl, where it is asked for
STACKS = "stacks"  # where every rank was when one hung
REQUESTS = ("stop", "save")  # files that a user touches
ANSWERS = "answers.jsonl"  # to fixed prompts on the way: {"step", "prompt", "answer"}
PROFILE = "profile"
EXPORTS = "exports"  # what was trained so far, behind some steps
_ON_THE_WAY = (ANSWERS, *TRACKERS, STATE, EARLIER, STACKS, PROFILE, EXPORTS)
RUN_FILES = (SETTINGS, "metrics.jsonl", "skipped.jsonl", *_ON_THE_WAY, *RESULTS)
PREVIOUS = "previous"  # the run that was overwritten, whole
_MOVING = ".previous"  # the same while it is being moved there
_SCRATCH = tuple(f".{name}." for name in RUN_FILES)  # prefixes of what a run killed while writing leaves behind


def locate(path: str) -> Path:
    """The folder meant by `output.path`. `new/../run` is `run`, whether or not `new` exists."""
    folder = Path(path)
    return folder.resolve() if ".." in folder.parts else folder


def check_output(loaded: Loaded) -> None:
    """Raise ValueError unless the run folder can be made or holds an earlier run that may be overwritten.

    An earlier run may not be overwritten by one that reads from it.
    """
    settings = loaded.config.output
    check_name("output.path", settings.path)
    for name, path in {**input_paths(loaded), "data.index_folder": loaded.config.data.index_folder}.items():
        _check_home(name, path or "")
    folder = locate(settings.path)
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not existing.is_dir():
        what = "file" if existing.exists() else "link that leads nowhere"
        raise UserError(f"output.path {settings.path!r} cannot be made: {str(existing)!r} is a {what}; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output.path {settings.path!r} cannot be made: {str(existing)!r} may not be written")
    entries = sorted(os.listdir(folder)) if folder.is_dir() else []
    if not entries:
        return
    goes_on = resumes_itself(loaded)
    if not (settings.overwrite or goes_on or _begins_again(loaded)):
        what = "is not empty: the run in it is finished" if is_complete(folder) else "is not empty"
        raise UserError(
            f"output.path {str(folder)!r} {what}; choose another or set output.overwrite=true"
            + (", or checkpoint.resume=auto to go on in it" if checkpoint_names(folder / STATE) else "")
        )
    if strange := strange_in(folder):
        raise UserError(
            f"output.path {str(folder)!r} holds {strange[0]!r}, which no run wrote; choose another folder or move it"
        )
    for name, path in () if goes_on else input_paths(loaded).items():
        if any(place in spelt.parents for place in _spellings(folder) for spelt in _spellings(path)):
            raise UserError(
                f"{name} {path!r} lies in output.path {str(folder)!r}, whose earlier run would be overwritten; choose "
                "another output.path"
            )


def strange_in(folder: Path) -> list[str]:
    """Names in a folder, if it is one, that no run wrote: nothing there is touched.

    A run begins with config.yaml: without it `eval.json` is a file of the user's, and so are all that are named alike.
    """
    if not folder.is_dir():
        return []
    has_run = any(os.path.lexists(folder / name) for name in (SETTINGS, PREVIOUS, _MOVING))
    ours = (*REQUESTS, *((*RUN_FILES, PREVIOUS, _MOVING) if has_run else ()))
    return sorted(name for name in os.listdir(folder) if name not in ours and not name.startswith(_SCRATCH))


def resumes_itself(loaded: Loaded) -> bool:
    """Whether the run goes on from a checkpoint in its own folder, which then stays as it is."""
    config = loaded.config
    if config.checkpoint.resume == "none" or config.output.overwrite:
        return False
    return bool(checkpoint_names(locate(config.output.path) / STATE))


def is_complete(folder: Path) -> bool:
    """Whether a run has written all of its results: its report is the last, and then the run before it is dropped."""
    has_both = all((folder / name).exists() for name in (SETTINGS, "report.html"))
    return has_both and not os.path.lexists(folder / PREVIOUS)


def _begins_again(loaded: Loaded) -> bool:
    """Whether the folder holds a run that ended before the first of its checkpoints: nothing is lost."""
    config, folder = loaded.config, locate(loaded.config.output.path)
    has_results = any((folder / name).exists() for name in RESULTS)
    return config.checkpoint.resume != "none" and config.checkpoint.every is not None and not has_results


def check_file(name: str, path: str, beginning: str) -> None:
    """Raise ValueError unless a file can be written at `path`, in place of none or of one of the command's own.

    `beginning`: of what the command writes. A file that begins otherwise is the user's, whatever it is.
    """
    check_name(name, path)
    if not Path(path).parent.is_dir():
        raise UserError(f"{name} {path!r} lies in a folder that does not exist; make the folder first")
    if Path(path).is_dir():
        raise UserError(f"{name} {path!r} is a folder; give the path of a file")
    if not os.access(Path(path).parent, os.W_OK | os.X_OK):
        raise UserError(f"{name} {path!r} lies in a folder that may not be written; choose another")
    if os.path.lexists(path) and not _begins(path, beginning.encode()):
        raise UserError(f"{name} {path!r} is there and was not written by this command; choose another file")


def _begins(path: str, beginning: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A folder that no other run goes on in or overwrites for the time of the block; it is made where it is not there.

    A lock that ends with the process, however that ends. A file system without locks has none. Raises ValueError where
    another run that lives has it.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            _lock(lock, folder)
        yield
    except BaseException:
        with suppress(OSError):  # there is something in it
            if is_new:
                folder.rmdir()
        raise
    finally:
        os.close(lock)


def _lock(number: int, folder: Path) -> None:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another run is at work in {str(folder)!r}; wait until it has ended, or set another output.path"
        ) from error


def make_room(folder: Path) -> bool:
    """Make the folder, without files of a run; True if there now is an earlier run in `previous`.

    While `previous` exists the run beside it did not complete and is the one deleted. Only renames keep a run, and the
    last of them makes `previous` appear, so a kill at any moment loses nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    moving, previous = folder / _MOVING, folder / PREVIOUS
    for name in os.listdir(folder):
        if name.startswith(_SCRATCH) or (name in RUN_FILES and previous.exists()):
            _remove(folder / name)
    for name in RUN_FILES:
        if os.path.lexists(folder / name):
            moving.mkdir(exist_ok=True)
            os.rename(folder / name, moving / name)
    if moving.exists():
        os.rename(moving, previous)
    return previous.exists()


def drop_results(folder: Path, replaced: Collection[str]) -> None:
    """Delete what a run that goes on from a checkpoint has written behind its last step: it writes it again.

    `replaced`: what stays until the new one is whole.
    """
    for name in os.listdir(folder):
        if (name in RESULTS and name not in replaced) or name.startswith(_SCRATCH):
            _remove(folder / name)
    for leftover in folder.glob(f"{EXPORTS}/*/.*"):  # of one that was killed
        _remove(leftover)


def keep_settings(folder: Path, step: int, text: str) -> None:
    """Keep the settings of the steps up to `step` of a run that goes on behind it; "": they are those of config.yaml.

    What was kept of steps behind it is dropped: they are taken again.
    """
    for end, path in earlier_settings(folder).items():
        if end > step:
            path.unlink()
    if text:
        (folder / EARLIER).mkdir(exist_ok=True)
        write_text(folder / EARLIER / f"until_{step:07}.yaml", text)


def earlier_settings(folder: Path) -> dict[int, Path]:
    """The settings of steps that were taken with others than config.yaml has, by the last of these steps, in order."""
    found = {int(path.stem.removeprefix("until_")): path for path in (folder / EARLIER).glob("until_*.yaml")}
    return dict(sorted(found.items()))


def drop_previous(folder: Path) -> None:
    """Delete the earlier run, now that the new one is complete."""
    if os.path.lexists(folder / PREVIOUS):
        _remove(folder / PREVIOUS)


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, or its parts as they come, so that it appears whole or not at all: beside its place, then moved.

    Raises ValueError where it cannot be written.
    """
    try:
        _write_text(path, text)
    except OSError as error:
        raise UserError(
            f"{str(path)!r} cannot be written ({error.strerror}); make room or choose another place"
        ) from error


def _write_text(path: Path, text: str | Iterable[str]) -> None:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())  # or a loss of power behind the rename leaves an empty file
            file.close()
            os.chmod(file.name, 0o644)  # temporary files are private
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def check_name(name: str, path: str) -> None:
    """Raise ValueError for `~`, and for a path no file system takes: too long, a null character, links in a circle."""
    _check_home(name, path)
    known = Path(path)
    for place in [known, *(Path(part) for part in known.parts)]:
        try:
            os.lstat(place)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{name} {path!r} is no usable path ({reason}); choose another") from error


def _check_home(name: str, path: str) -> None:
    if path.startswith("~"):
        raise UserError(
            f"{name} {path!r} begins with '~', which only a shell expands; write the folder out, or as $HOME/..."
        )


def input_paths(source: Loaded | Settings) -> dict[str, str]:
    """Every path a run reads, by the setting that names it."""
    values = source.values if isinstance(source, Settings) else source.config.model_dump()
    model, data, resume = values["model"], values["data"], values.get("checkpoint", {}).get("resume")
    paths = {
        "the config file": str(source.path),
        **({} if resume in ("none", "auto") else {"checkpoint.resume": resume}),
        **{f"model.{name}": model.get(name) for name in ("path", "adapter")},
        **{f"data.{name}": data.get(name) for name in ("root", "template")},
        **{f"data.{name}{place}": path for name in ("train", "eval") for place, path in _set_paths(data.get(name))},
    }
    named = {name: path for name, path in paths.items() if isinstance(path, str)}
    if "model.path" in named:
        named["the model's config.json"] = os.path.join(named["model.path"], "config.json")
    return named


def _set_paths(sets: Any) -> list[tuple[str, Any]]:
    """(place in the list, path) of data sets as a config names them, which may be wrong; "" where there is one path."""
    if not isinstance(sets, list | tuple):
        return [("", sets)]
    return [(f"[{i}]", item.get("path") if isinstance(item, dict) else item) for i, item in enumerate(sets)]


def _spellings(path: str | Path) -> set[Path]:
    """A path as written and with links followed: a link in the run folder is lost as its target is."""
    return {Path(os.path.abspath(path)), Path(os.path.realpath(path))}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
