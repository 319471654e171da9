"""The figures of a device as a small YAML file: what `mmfn calibrate` writes and `mmfn plan --device FILE` reads."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from mmfn.errors import UserError
from mmfn.parallel.planning.account import ATTENTION, GROUPED, LARGE, NARROW, NARROW_GROUPED
from mmfn.parallel.planning.devices import Device, device

SUFFIXES = (".yaml", ".yml")
SHARES = (LARGE, NARROW, GROUPED, NARROW_GROUPED, ATTENTION)
WHOLE = ("memory_bytes", "ranks_per_node")  # whole numbers
MAY_BE_NONE = ("transfer_units",)  # 0, too
TEXTS = ("kind", "source")
CURE = "write one with mmfn calibrate --out FILE"


def planned_device(name: str) -> Device:
    """The device of a name, or of a file of `mmfn calibrate`. Raises ValueError for an unknown one."""
    return read_device(name) if name.endswith(SUFFIXES) else device(name)


def device_text(chosen: Device, head: Sequence[str]) -> str:
    """The file of a device, behind the lines of a comment: what is not a whole number, to four digits."""
    values = {name: _short(value) for name, value in asdict(chosen).items() if name != "name"}
    values["shares"] = {name: _short(share) for name, share in chosen.shares.items()}
    body = yaml.safe_dump(values, sort_keys=False, width=10**6)
    return "".join(f"# {line}\n" for line in head) + body


def read_device(path: str) -> Device:
    """The device of a file, whose name is the path. Raises ValueError for a file that holds none."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"device file {path!r} cannot be read: {reason}; {CURE}") from error
    if not isinstance(values, Mapping):
        raise UserError(f"device file {path!r} holds no settings; {CURE}")
    known = {f.name: f for f in fields(Device) if f.name != "name"}
    unknown = [str(name) for name in values if name not in known]
    absent = [name for name, f in known.items() if name not in values and f.default is MISSING]
    if unknown or absent:
        what = f"has an unknown {unknown[0]!r}" if unknown else f"lacks {absent[0]!r}"
        raise UserError(f"device file {path!r} {what}; it may have {', '.join(known)}")
    found: dict[str, Any] = {name: _value(path, name, value) for name, value in values.items()}
    return Device(**found, name=path)


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
