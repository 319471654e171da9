"""Data sets that the library `datasets` has saved in a folder: Arrow tables, mapped into memory."""

import hashlib
import importlib
import json
import threading
from pathlib import Path
from typing import Any

from mmfn.errors import UserError
from mmfn.train.data.sources.cells import plain, stored_bytes
from mmfn.train.data.sources.pieces import reopen

STATE, SPLITS = "state.json", "dataset_dict.json"


class ArrowSource:
    """The rows of a folder written by `save_to_disk`; images, videos and sounds are the bytes stored there."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a folder of several splits, one that cannot be opened, and without `datasets`."""
        if (path / SPLITS).is_file():
            raise UserError(f"dataset {str(path)!r} holds splits; name one of {_splits(path)}, as {path}/train")
        try:
            datasets = importlib.import_module("datasets")
        except ImportError as error:
            raise UserError(
                f"dataset {str(path)!r} needs the library datasets; install it with pip install mmfn[datasets]"
            ) from error
        try:
            table = datasets.load_from_disk(str(path), keep_in_memory=False)
            self._table: Any = table.with_format("arrow")  # as it is stored: nothing is decoded
            digest = hashlib.sha256((path / STATE).read_bytes())
            for file in json.loads((path / STATE).read_bytes())["_data_files"]:
                digest.update(f"{file['filename']} {(path / file['filename']).stat().st_size}".encode())
        except Exception as error:  # of Arrow, of JSON, of the library itself
            raise UserError(
                f"dataset {str(path)!r} cannot be read ({error}); save it anew with save_to_disk"
            ) from error
        self.path, self.fingerprint = path, digest.hexdigest()
        self._local = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return reopen, (ArrowSource, (self.path,), self.fingerprint)

    def __len__(self) -> int:
        return len(self._table)

    def entry(self, index: int) -> Any:
        """Raises ValueError for values that JSON does not know."""
        return plain(self._row(index))

    def place(self, index: int) -> str:
        """Rows are counted from 0."""
        return f"{str(self.path)!r}, row {index}"

    def medium(self, index: int, name: str) -> bytes | None:
        """The bytes of a cell with that name."""
        return stored_bytes(self._row(index), name)

    def _row(self, index: int) -> dict[str, Any]:
        row: dict[str, Any]
        held, row = getattr(self._local, "row", (-1, {}))
        if held == index:
            return row
        try:
            row = self._table[index].to_pylist(maps_as_pydicts="strict")[0]
        except Exception as error:
            raise UserError(f"the row cannot be read ({error}); save the data set anew") from error
        self._local.row = index, row  # what asks for its media next
        return row


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (path / STATE).is_file() or (path / SPLITS).is_file()


def _splits(path: Path) -> list[str]:
    try:
        return sorted(json.loads((path / SPLITS).read_bytes())["splits"])
    except (ValueError, KeyError, TypeError):
        return sorted(folder.name for folder in path.iterdir() if folder.is_dir())
