"""Reading values out of a Hugging Face `config.json`, each checked where it is read."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mmfn.errors import UserError

T = TypeVar("T")


def sections(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every mapping of a config with its key, the config itself, as "", first, and outer ones before inner ones.

    >>> [key for key, _ in sections({"thinker_config": {"text_config": {}}, "vision_config": {}})]
    ["", "thinker_config", "vision_config", "text_config"]
    """
    level: list[tuple[str, Any]] = [("", values)]
    while level:
        yield from level
        level = [(key, x) for _, outer in level for key, x in outer.items() if isinstance(x, Mapping)]


@dataclass(frozen=True)
class ConfigReader:
    """Reads one mapping of a config; `name` is its name in messages (`text_config`).

    >>> ConfigReader({"hidden_size": 36}, "text_config").integer("hidden_size")
    36

    A key that is absent takes the default, which families set to the default of the transformers class; every method
    raises ValueError naming the key, the value received and what is expected.
    """

    values: Mapping[str, Any]
    name: str = "config"

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise UserError(f"{self.name} is {self.values!r} but must be a mapping; pass the dict of a config.json")

    def section(self, *keys: str) -> "ConfigReader":
        """A reader of the first of `keys` that holds a mapping (of an empty one if none is there)."""
        for key in keys:
            if self.values.get(key) is not None:
                return ConfigReader(self.values[key], self._path(key))
        return ConfigReader({}, self._path(keys[0]))

    def with_defaults(self, defaults: Mapping[str, Any]) -> "ConfigReader":
        """A reader of the same values, and of `defaults` for those that are absent or null."""
        there = {key: value for key, value in self.values.items() if value is not None}
        return ConfigReader({**defaults, **there}, self.name)

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

    def choice(self, key: str, choices: Mapping[str, T], default: str) -> T:
        """What a string stands for: one of the keys of `choices`."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self._error(key, value, f"one of {sorted(choices)}")
        return choices[value]

    def strings(self, key: str, choices: Sequence[str], length: int, default: Sequence[str]) -> tuple[str, ...]:
        """A list of `length` strings, each one of `choices`: the kinds of a model's layers."""
        value = self.get(key, default)
        if not isinstance(value, list | tuple) or len(value) != length or any(v not in choices for v in value):
            raise self._error(key, value, f"a list of {length} of {sorted(choices)}")
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

    def _error(self, key: str, value: Any, expected: str) -> UserError:
        return UserError(f"{self._path(key)} is {value!r} but must be {expected}; correct the model's config.json")
