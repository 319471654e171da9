"""Writes chats.json beside this file: conversations as the published Qwen3-VL chat template renders them.

    python tests/goldens/make_chat_goldens.py TEMPLATE.jinja

TEMPLATE.jinja is the chat template of a Qwen3-VL checkpoint (or the copy in the wheel of trl 1.16.0,
trl/chat_templates/qwen3_vl.jinja). Rendered with transformers 5.23.0.
"""

import json
import sys
from pathlib import Path
from typing import Any

IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "find", "arguments": {"name": "Straße", "count": 2}}}
RAW_CALL = {"name": "find", "arguments": '{"name": "x"}'}
TOOL = {"type": "function", "function": {"name": "find", "description": "Finds ä.", "parameters": {"type": "object"}}}
CASES: list[dict[str, Any]] = [
    {"messages": [turn("user", "Hi"), turn("assistant", "Hello.")]},
    {"messages": [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "\n\nHello.\n")]},
    {"messages": [turn("system", [text("Be "), text("brief.")]), turn("user", [IMAGE, text("What?"), IMAGE])]},
    {"messages": [turn("user", [text("a:"), VIDEO, text(" b")]), turn("assistant", [text("x"), text("y")])]},
    {"messages": [turn("user", "  Hi\n"), turn("assistant", ""), turn("user", "And?"), turn("assistant", "汉字 é")]},
    {"messages": [turn("user", "Hi")], "add_generation_prompt": True},
    {
        "messages": [turn("user", [IMAGE, VIDEO, IMAGE, text("?")])],
        "add_vision_id": True,
        "add_generation_prompt": True,
    },
    {"messages": [turn("user", "Find"), turn("assistant", "I look.", tool_calls=[CALL, RAW_CALL])], "tools": [TOOL]},
    {
        "messages": [
            turn("system", "Be brief."),
            turn("user", "Find"),
            turn("assistant", "", tool_calls=[CALL]),
            turn("tool", "one"),
            turn("tool", [IMAGE, text("two")]),
            turn("assistant", "Both."),
            turn("tool", "late"),
        ],
        "tools": [TOOL, TOOL],
    },
]


def main(template: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = template.read_text(encoding="utf-8")
    goldens = []
    for case in CASES:
        options = {k: v for k, v in case.items() if k != "messages"}
        rendered, _ = render_jinja_template(conversations=[case["messages"]], chat_template=source, **options)
        goldens.append({**case, "text": rendered[0]})
    out = json.dumps(goldens, indent=1, ensure_ascii=False) + "\n"
    (Path(__file__).parent / "chats.json").write_text(out, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
