"""The configuration of a run: one YAML file plus dotted overrides, checked as a whole before anything else happens.

Unknown keys are refused by name, values of the wrong type are never converted, and each value remembers where it came
from. Relative paths mean the current directory. The settings themselves are declared in `mmfn.train.config.schema`.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from pydantic import ValidationError

from mmfn.errors import UserError
from mmfn.train.config.rule import Subject
from mmfn.train.config.rules import breaches
from mmfn.train.config.schema import Config
from mmfn.train.config.section import ConfigSection


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was given, not yet checked: `values[section][key]`, what it is from, and origins as those of `Loaded`.

    `before`: the values without overrides, where there are any.
    """

    values: Mapping[str, Mapping[str, Any]]
    path: Path
    origins: Mapping[str, str]
    before: Mapping[str, Mapping[str, Any]] | None = None

    def having(self, section: str, **values: Any) -> "Settings":
        """The same with some values of a section replaced."""
        return replace(self, values={**self.values, section: {**self.values.get(section, {}), **values}})

    def overridden(self, overrides: Sequence[str]) -> "Settings":
        """The same after `key=value` overrides in order. Raises ValueError for one that is none."""
        before = self.values if overrides and self.before is None else self.before
        return replace(_with(self, map(_read_override, overrides)), before=before)

    def without(self, keys: Collection[str]) -> "Settings":
        """The same without some dotted keys."""
        values = {
            section: {name: value for name, value in named.items() if f"{section}.{name}" not in keys}
            for section, named in self.values.items()
        }
        origins = {key: origin for key, origin in self.origins.items() if key not in keys}
        return replace(self, values=values, origins=origins)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checked config, the file it is from, and where every dotted key that was set is: "FILE:LINE" or "override".

    `notes`: settings that this layout idles, and those of the file that were left out as overrides idle them.
    """

    config: Config
    path: Path
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()


# What PyYAML raises, besides its own errors, for values that do not fit their tag (`!!int x`) and for deep nesting.
_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)


class _Setting(NamedTuple):
    key: str
    value: Any
    origin: str


class YamlLoader(yaml.SafeLoader):
    """YAML with numbers as in YAML 1.2: SafeLoader reads 1e-3 as a string. A repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises yaml.YAMLError for a repeated key; what is merged by `<<` may be set again."""
        key_nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        mapping = super().construct_mapping(node, deep)
        keys = [self.construct_object(key, deep=True) for key in key_nodes]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is set twice", key_nodes[i].start_mark
                )
        return mapping


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def known_keys() -> dict[str, str]:
    """Every dotted key and its description, in declaration order."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    return {
        f"{name}.{key}": field.description or ""
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, ConfigSection)
        for key, field in section.model_fields.items()
    }


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a YAML file, apply `key=value` overrides in order (values are YAML) and check everything.

    Raises ValueError: a file that is missing or no YAML mapping, an unknown or repeated key, a missing or wrong value.
    """
    return check(read_settings(path, overrides))


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """The first half of `load_config`. Raises ValueError: no such file, no YAML mapping, an unknown or repeated key."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"cannot read config {str(path)!r}: {reason}; give the path of a YAML file") from error
    return _settings(text, path).overridden(overrides)


def load_text(text: str, source: str, overrides: Sequence[str] = ()) -> Loaded:
    """`load_config` of the text of a YAML file, which `describe` may have written; `source` is where it stands."""
    return check(_settings(text, Path(source)).overridden(overrides))


def check(settings: Settings, *, is_plan: bool = False) -> Loaded:
    """The second half of `load_config`. Raises ValueError for a missing or wrong value, or a rule that is broken.

    `is_plan`: nothing will be run (see `rules.Subject`).
    """
    settings, left_out = leave_idle_out(settings)
    values, path, origins = settings.values, settings.path, settings.origins
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(error, str(path), values, origins)) from error
    notes = list(left_out)
    for breach in breaches(Subject(config=config, is_plan=is_plan)):
        if not breach.warns:
            raise UserError(f"{origins.get(breach.setting, path)}: {breach.sentence}")
        notes.append(breach.sentence)
    return Loaded(config=config, path=path, origins=origins, notes=tuple(notes))


def leave_idle_out(settings: Settings) -> tuple[Settings, tuple[str, ...]]:
    """The settings without those of the file that overrides idle, and a note for each.

    Over a file with `data.eval` and `eval.batch_samples` the override `data.eval=null` leaves the second one out. What
    has no effect by the file alone, or is an override itself, stays and is refused.
    """
    of_file = {key for key, origin in settings.origins.items() if origin != "override"}
    if settings.before is None or not of_file:
        return settings, ()
    before, now = _idle_settings(settings.before), _idle_settings(settings.values)
    if before is None or now is None:
        return settings, ()
    idled = {key: reason for key, reason in now.items() if key in of_file and key not in before}
    if not idled:
        return settings, ()
    rest, notes = leave_idle_out(settings.without(idled))
    return rest, (*(f"{reason}: it is left out" for reason in idled.values()), *notes)


def load_section(name: str, values: Mapping[str, Any], overrides: Sequence[str]) -> Any:
    """One section from values and overrides, for a command that needs no whole config.

    Raises ValueError for a wrong value and for an override of another section.
    """
    settings = Settings(values={name: values}, path=Path(), origins={}).overridden(overrides)
    if other := [key for key in settings.origins if not key.startswith(f"{name}.")]:
        raise UserError(f"override: {other[0]} has no effect here, where settings of {name} alone count; remove it")
    try:
        return cast(Any, Config.model_fields[name].annotation).model_validate(settings.values[name])
    except ValidationError as error:
        raise UserError(_sentence(error, "command line", settings.values, settings.origins, (name,))) from error


def describe(loaded: Loaded) -> str:
    """The whole config as YAML; each value with its origin as a comment. It can be read back as a config.

    An origin is `default`, `FILE:LINE` or `command line`.
    """
    lines, names = [], {"override": "command line"}
    for name, section in loaded.config.model_dump(mode="json").items():
        lines.append(f"{name}:")
        for key, value in section.items():
            text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
            text = text.removesuffix("\n").removesuffix("\n...")
            origin = loaded.origins.get(f"{name}.{key}", "default")
            lines.append(f"{f'  {key}: {text}':<60}  # {names.get(origin, origin)}")
    return "\n".join(lines) + "\n"


def _settings(text: str, path: Path) -> Settings:
    nested: dict[str, dict[str, Any]] = {name: {} for name in ("model", "data", "optimizer", "train", "output")}
    return _with(Settings(values=nested, path=path, origins={}), _read_file(text, str(path)))


def _with(settings: Settings, entries: Iterable[_Setting]) -> Settings:
    for key, value, origin in entries:
        section, name = key.split(".")
        settings = replace(settings.having(section, **{name: value}), origins={**settings.origins, key: origin})
    return settings


def _read_file(text: str, source: str) -> list[_Setting]:
    try:
        loader = YamlLoader(text)
        root = loader.get_single_node()
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"{where} is no valid YAML: {_reason(error)}; correct it") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"config {source!r} must be a mapping of sections such as 'model:', got something else")
    settings: list[_Setting] = []
    for name, section, where in _entries(root, source):
        if name not in Config.model_fields:
            raise UserError(_unknown(name, where))
        if not isinstance(section, yaml.MappingNode):
            raise UserError(f"{where}: section {name!r} must be a mapping of settings, got {section.value!r}")
        for key, node, line in _entries(section, source, prefix=f"{name}."):
            if key not in known_keys():
                raise UserError(_unknown(key, line))
            try:
                settings.append(_Setting(key, loader.construct_object(node, deep=True), line))
            except _YAML_ERRORS as error:
                raise UserError(
                    f"{line}: {key} is no valid YAML: {_reason(error)}; correct it, or quote it if it is text"
                ) from error
    return settings


def _idle_settings(values: Mapping[str, Mapping[str, Any]]) -> dict[str, str] | None:
    """Settings that are refused as having no effect, each with a sentence; None where values are missing or wrong."""
    try:
        config = Config.model_validate(values)
    except ValidationError:
        return None
    found = [breach for breach in breaches(Subject(config=config)) if breach.is_idle and not breach.warns]
    return {breach.setting: breach.sentence.rpartition("; ")[0] for breach in found}


def _entries(mapping: yaml.MappingNode, source: str, prefix: str = "") -> list[tuple[str, yaml.Node, str]]:
    """`(key, value node, "FILE:LINE")` of a YAML mapping. A repeated key is an error, not a silent last wins."""
    entries: dict[str, tuple[str, yaml.Node, str]] = {}
    for key_node, value_node in mapping.value:
        key, where = f"{prefix}{key_node.value}", f"{source}:{key_node.start_mark.line + 1}"
        if key in entries:
            raise UserError(f"{where}: key {key!r} was already set at {entries[key][2]}; keep one of them")
        entries[key] = (key, value_node, where)
    return list(entries.values())


def _read_override(text: str) -> _Setting:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"override {text!r} has no '='; write it as key=value, for instance train.steps=100")
    if key not in known_keys():
        raise UserError(_unknown(key, "override"))
    try:
        return _Setting(key, yaml.load(value, Loader=YamlLoader), "override")
    except _YAML_ERRORS as error:
        raise UserError(
            f"override: {key} is {value[:100]!r} but the value is no valid YAML: {_reason(error)}; "
            "correct it, or quote it if it is text"
        ) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error)


def _unknown(key: str, where: str) -> str:
    """Nearest by the whole dotted key or by its last part, whichever is closer: `lr` finds `optimizer.lr`."""

    def likeness(known: str) -> float:
        last = SequenceMatcher(None, key.rpartition(".")[2], known.rpartition(".")[2]).ratio()
        return max(SequenceMatcher(None, key, known).ratio(), last * 0.99)

    candidates = list(known_keys()) if "." in key or where == "override" else [*Config.model_fields, *known_keys()]
    return f"{where}: unknown key {key!r}; the nearest known key is {max(candidates, key=likeness)!r}"


def _spell(value: Any) -> str:
    """A value as YAML spells it where Python does otherwise: null, true, false."""
    if isinstance(value, list):
        return f"[{', '.join(map(_spell, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_spell(key)}: {_spell(item)}' for key, item in value.items())}}}"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _sentence(
    error: ValidationError,
    source: str,
    values: Mapping[str, Mapping[str, Any]],
    origins: Mapping[str, str],
    prefix: tuple[str, ...] = (),
) -> str:
    """The first problem as one sentence: where, which setting, what it is, what it should be."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in (*prefix, *first["loc"])[:2])
    section, _, name = key.partition(".")
    if first["type"] == "missing" and key not in origins:
        return f"{source}: {key} is required ({known_keys()[key]}); set it in the file or as {key}=VALUE"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "it has too few entries"
    where = origins.get(key, source)
    return (
        f"{where}: {key} is {_spell(values[section][name])} but {message[:1].lower()}{message[1:]}; correct the value"
    )
