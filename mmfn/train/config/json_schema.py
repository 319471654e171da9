"""The settings as a JSON schema, by which an editor completes, explains and marks the keys of a config.

It says what one setting may be; what settings mean to each other is said by the rules, when a config is checked.
"""

import json
from typing import Any

from mmfn.train.config.schema import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema of a whole config, every setting with its description and default."""
    schema: dict[str, Any] = _plain(Config.model_json_schema())
    for section in schema["properties"].values():
        section.pop("default", None)  # that of a section is those of its settings
    return {"$schema": DIALECT, "title": "A run of mmfn (docs/config.md)", **schema}


def schema_text() -> str:
    """The schema as the text of a file."""
    return json.dumps(json_schema(), indent=1) + "\n"


def _plain(node: Any) -> Any:
    """A node without titles, which repeat the keys, and with the least length of arrays under its name in JSON."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    names = {"minLength": "minItems"} if node.get("type") == "array" else {}
    return {
        names.get(key, key): _plain(value)
        for key, value in node.items()
        if not (key == "title" and isinstance(value, str))
    }
