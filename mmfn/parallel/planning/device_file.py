"""The figures of a device as a small YAML file: what `mmfn calibrate` writes and `mmfn plan --device FILE` reads."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from mmfn.errors import UserError
from mmfn.parallel.planning.account import ATTENTION, GROUPED, LARGE, NARROW, NARROW_GROUPED

SUFFIXES = (".yaml", ".yml")
SHARES = (LARGE, NARROW, GROUPED, NARROW_GROUPED, ATTENTION)
WHOLE = ("memory_bytes", "ranks_per_node")  # whole numbers
MAY_BE_NONE = ("transfer_units",)  # 0, too
TEXTS = ("kind", "source")
CURE = "write one with mmfn calibrate --out FILE"


def is_file(name: str) -> bool:
    """Whether a name is that of a file."""
    return name.endswith(SUFFIXES)


def device_text(device: Any, head: Sequence[str]) -> str:
    """The file of a device, behind the lines of a comment: what is not a whole number, to four digits."""
    values = {name: _short(value) for name, value in asdict(device).items() if name != "name"}
    values["shares"] = {name: _short(share) for name, share in device.shares.items()}
    body = yaml.safe_dump(values, sort_keys=False, width=10**6)
    return "".join(f"# {line}\n" for line in head) + body


def read_fields(path: str, kind: type) -> dict[str, Any]:
    """The fields of a device (the dataclass `kind`), by name. Raises ValueError for a file that is none."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"device file {path!r} cannot be read: {reason}; {CURE}") from error
    if not isinstance(values, Mapping):
        raise UserError(f"device file {path!r} holds no settings; {CURE}")
    known = {f.name: f for f in fields(kind) if f.name != "name"}
    unknown = [str(name) for name in values if name not in known]
    absent = [name for name, f in known.items() if name not in values and f.default is MISSING]
    if unknown or absent:
        what = f"has an unknown {unknown[0]!r}" if unknown else f"lacks {absent[0]!r}"
        raise UserError(f"device file {path!r} {what}; it may have {', '.join(known)}")
    found = {name: _value(path, name, value) for name, value in values.items()}
    return {**found, "name": path}


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _value(path: str, name: str, value: Any) -> Any:
    if name in TEXTS:
        if not isinstance(value, str):
            raise UserError(f"device file {path!r}: {name} is {value!r} but should be text; {CURE}")
        return value
    if name == "shares":
        if not isinstance(value, Mapping) or set(value) != set(SHARES):
            raise UserError(f"device file {path!r}: shares should have {', '.join(SHARES)}; {CURE}")
        return {key: _number(path, f"the share of {key}", value[key]) for key in SHARES}
    number = 0.0 if value == 0 and name in MAY_BE_NONE else _number(path, name, value)
    return int(number) if name in WHOLE else number


def _number(path: str, name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not isfinite(value) or value <= 0:
        raise UserError(f"device file {path!r}: {name} is {value!r} but should be a positive number; {CURE}")
    return float(value)
