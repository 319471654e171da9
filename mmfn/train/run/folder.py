"""The run folder: where it may be, what a run writes there, and how an earlier run is kept until a new one is complete.

`check_output` writes nothing. `make_room` and `drop_previous` only ever touch entries that a run wrote.
"""

import os
import shutil
import tempfile
from pathlib import Path

from mmfn.errors import UserError
from mmfn.train.config.load import Loaded, Settings

RUN_FILES = ("config.yaml", "metrics.jsonl", "eval.json", "report.html", "adapter", "checkpoint")
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
    _check_name("output.path", settings.path)
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
    if not settings.overwrite:
        raise UserError(f"output.path {str(folder)!r} is not empty; choose another or set output.overwrite=true")
    if strange := [name for name in entries if not _is_ours(name)]:
        raise UserError(
            f"output.path {str(folder)!r} holds {strange[0]!r}, which no run wrote; choose another folder or move it"
        )
    for name, path in input_paths(loaded).items():
        if any(place in spelt.parents for place in _spellings(folder) for spelt in _spellings(path)):
            raise UserError(
                f"{name} {path!r} lies in output.path {str(folder)!r}, whose earlier run would be overwritten; choose "
                "another output.path"
            )


def check_file(name: str, path: str, loaded: Loaded | Settings) -> None:
    """Raise ValueError unless a file can be written at `path`, replacing nothing the command reads."""
    _check_name(name, path)
    if not Path(path).parent.is_dir():
        raise UserError(f"{name} {path!r} lies in a folder that does not exist; make the folder first")
    if Path(path).is_dir():
        raise UserError(f"{name} {path!r} is a folder; give the path of a file")
    if not os.access(Path(path).parent, os.W_OK | os.X_OK):
        raise UserError(f"{name} {path!r} lies in a folder that may not be written; choose another")
    for read, source in input_paths(loaded).items():
        if os.path.realpath(path) == os.path.realpath(source):
            raise UserError(f"{name} {path!r} is {read} itself; choose another file")


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


def drop_previous(folder: Path) -> None:
    """Delete the earlier run, now that the new one is complete."""
    if os.path.lexists(folder / PREVIOUS):
        _remove(folder / PREVIOUS)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears complete or not at all: beside its place, then moved there."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.close()
            os.chmod(file.name, 0o644)  # temporary files are private
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _check_name(name: str, path: str) -> None:
    """Raise ValueError for a path no file system takes: too long, a null character, links in a circle."""
    known = Path(path)
    for place in [known, *(Path(part) for part in known.parts)]:
        try:
            os.lstat(place)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{name} {path!r} is no usable path ({reason}); choose another") from error


def _is_ours(name: str) -> bool:
    return name in (*RUN_FILES, PREVIOUS, _MOVING) or name.startswith(_SCRATCH)


def input_paths(source: Loaded | Settings) -> dict[str, str]:
    """Every path a run reads, by the setting that names it."""
    values = source.values if isinstance(source, Settings) else source.config.model_dump()
    model, data = values["model"], values["data"]
    paths = {
        "the config file": str(source.path),
        **{f"model.{name}": model.get(name) for name in ("path", "adapter")},
        **{f"data.{name}": data.get(name) for name in ("train", "eval", "root", "template")},
    }
    named = {name: path for name, path in paths.items() if isinstance(path, str)}
    if "model.path" in named:
        named["the model's config.json"] = os.path.join(named["model.path"], "config.json")
    return named


def _spellings(path: str | Path) -> set[Path]:
    """A path as written and with links followed: a link in the run folder is lost as its target is."""
    return {Path(os.path.abspath(path)), Path(os.path.realpath(path))}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
