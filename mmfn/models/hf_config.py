"""Reading values out of a Hugging Face `config.json`, each checked where it is read."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Section:
    """One mapping of a config and its name in messages (`text_config`).

    A key that is absent takes the default, which families set to the default of the transformers class; every method
    raises ValueError naming the key, the value received and what is expected.
    """

    values: Mapping[str, Any]
    name: str = "config"

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise ValueError(f"{self.name} is {self.values!r} but must be a mapping; pass the dict of a config.json")

    def section(self, *keys: str) -> "Section":
        """The first of `keys` that holds a mapping (an empty section if none is there)."""
        for key in keys:
            if self.values.get(key) is not None:
                return Section(self.values[key], self._path(key))
        return Section({}, self._path(keys[0]))

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """An int of at least `minimum`."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self._error(key, value, f"an integer of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None, minimum: float = 0.0) -> float:
        """A finite float of at least `minimum`."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not minimum <= value <= sys.float_info.max:
            raise self._error(key, value, f"a finite number of at least {minimum}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def integers(self, key: str, default: Sequence[int]) -> tuple[int, ...]:
        """A list of ints of at least 0."""
        value = self.get(key, default)
        if not isinstance(value, list | tuple) or any(type(v) is not int or v < 0 for v in value):
            raise self._error(key, value, "a list of integers of at least 0")
        return tuple(value)

    def only(self, key: str, allowed: Any, reason: str) -> None:
        """Refuse every value but `allowed` (or absent): a setting that mmfn does not have must not pass silently."""
        value = self.get(key, allowed)
        if value != allowed:
            raise self._error(key, value, f"{allowed!r}: {reason}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def _path(self, key: str) -> str:
        return key if self.name == "config" else f"{self.name}.{key}"

    def _error(self, key: str, value: Any, expected: str) -> ValueError:
        return ValueError(f"{self._path(key)} is {value!r} but must be {expected}; correct the model's config.json")
