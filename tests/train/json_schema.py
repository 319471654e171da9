"""What a JSON schema says of a value, by as much of the language as the schema of the settings has."""

from collections.abc import Iterator, Mapping
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}
IGNORED = {"description", "default", "title", "$defs", "$schema"}


def faults(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Where and how a value breaks a schema. A keyword that is not known here is an error of the caller."""
    for keyword, wanted in schema.items():
        if keyword not in IGNORED:
            yield from _RULES[keyword](value, wanted, schema, root, place)


def _ref(value: Any, wanted: Any, schema: Any, root: Any, place: str) -> Iterator[str]:
    yield from faults(value, root["$defs"][wanted.removeprefix("#/$defs/")], root, place)


def _type(value: Any, wanted: Any, schema: Any, root: Any, place: str) -> Iterator[str]:
    is_truth = isinstance(value, bool)
    if not isinstance(value, TYPES[wanted]) or (is_truth and wanted != "boolean"):
        yield f"{place}: no {wanted}"


def _any_of(value: Any, wanted: Any, schema: Any, root: Any, place: str) -> Iterator[str]:
    if all(list(faults(value, one, root, place)) for one in wanted):
        yield f"{place}: none of {len(wanted)}"


def _properties(value: Any, wanted: Any, schema: Any, root: Any, place: str) -> Iterator[str]:
    for key, item in value.items() if isinstance(value, dict) else ():
        if key in wanted:
            yield from faults(item, wanted[key], root, f"{place}.{key}")


def _others(value: Any, wanted: Any, schema: Any, root: Any, place: str) -> Iterator[str]:
    for key, item in value.items() if isinstance(value, dict) else ():
        if key not in schema.get("properties", {}):
            if wanted is False:
                yield f"{place}.{key}: unknown"
            elif wanted is not True:
                yield from faults(item, wanted, root, f"{place}.{key}")


def _items(value: Any, wanted: Any, schema: Any, root: Any, place: str) -> Iterator[str]:
    for index, item in enumerate(value) if isinstance(value, list) else ():
        yield from faults(item, wanted, root, f"{place}[{index}]")


def _first_items(value: Any, wanted: Any, schema: Any, root: Any, place: str) -> Iterator[str]:
    for index, (item, one) in enumerate(zip(value, wanted, strict=False)) if isinstance(value, list) else ():
        yield from faults(item, one, root, f"{place}[{index}]")


def _required(value: Any, wanted: Any, schema: Any, root: Any, place: str) -> Iterator[str]:
    yield from (f"{place}.{key}: missing" for key in wanted if isinstance(value, dict) and key not in value)


def _bound(holds: Any, kinds: Any, measure: Any = lambda x: x) -> Any:
    def rule(value: Any, wanted: Any, schema: Any, root: Any, place: str) -> Iterator[str]:
        if isinstance(value, kinds) and not isinstance(value, bool) and not holds(measure(value), wanted):
            yield f"{place}: {value!r} against {wanted!r}"

    return rule


_RULES: dict[str, Any] = {
    "$ref": _ref,
    "type": _type,
    "anyOf": _any_of,
    "properties": _properties,
    "additionalProperties": _others,
    "items": _items,
    "prefixItems": _first_items,
    "required": _required,
    "enum": lambda value, wanted, schema, root, place: iter(() if value in wanted else (f"{place}: none of {wanted}",)),
    "minimum": _bound(lambda x, y: x >= y, (int, float)),
    "maximum": _bound(lambda x, y: x <= y, (int, float)),
    "exclusiveMinimum": _bound(lambda x, y: x > y, (int, float)),
    "exclusiveMaximum": _bound(lambda x, y: x < y, (int, float)),
    "minItems": _bound(lambda x, y: x >= y, list, len),
    "maxItems": _bound(lambda x, y: x <= y, list, len),
}
