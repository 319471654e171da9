"""Counts what is taken out of safetensors files."""

import threading
from collections import Counter, defaultdict
from typing import Any

import pytest

from mmfn.interop import files


def count(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counter[str]]:
    """From now on: thread -> name of a tensor -> bytes read of it."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    open_file = files.safe_open

    def note(name: str, value: Any) -> Any:
        counts[threading.current_thread().name][name] += value.nbytes
        return value

    class Slice:
        def __init__(self, name: str, view: Any) -> None:
            self.name, self.view = name, view
            self.get_shape, self.get_dtype = view.get_shape, view.get_dtype

        def __getitem__(self, index: Any) -> Any:
            return note(self.name, self.view[index])

    class File:
        def __init__(self, path: Any, framework: str) -> None:
            self.file = open_file(path, framework=framework)

        def __enter__(self) -> "File":
            self.handle = self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> Any:
            return self.handle.keys()

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.handle.get_slice(name))

        def get_tensor(self, name: str) -> Any:
            return note(name, self.handle.get_tensor(name))

    monkeypatch.setattr(files, "safe_open", File)
    return counts
