"""Chat templates as programs: messages become a text, and the spans of what stands in generation blocks.

A template is run by the library's own sandboxed renderer. Its tracker of `{% generation %}` blocks is one object that
all threads share, so the blocks are read from the text instead: a copy of the source (`with_marks`), which
the library compiles once, writes a noncharacter at both ends of each.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from mmfn.errors import UserError

BEGIN, END = "\ufdd0", "\ufdd1"  # noncharacters of Unicode: no text has them
Message = Mapping[str, Any]
Spans = list[tuple[int, int]]
_BLOCK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_MACRO = f"{{% macro mmfn_answer() %}}{BEGIN}{{{{ caller() }}}}{END}{{% endmacro %}}\n"


class BrokenTemplateError(UserError):
    """A template that no messages can mend."""


def has_blocks(template: str) -> bool:
    """Whether a template marks what the assistant writes."""
    return any(match[2] is None for match in _BLOCK.finditer(template))


def with_marks(template: str) -> str:
    """The source with each generation block as the call of a macro that writes `BEGIN` and `END` around it."""
    if not has_blocks(template):
        return template
    calls = {None: "call mmfn_answer()", "end": "endcall"}
    return _MACRO + _BLOCK.sub(lambda match: f"{{%{match[1]} {calls[match[2]]} {match[3]}%}}", template)


def roles_of_lists(program: str, variables: Mapping[str, Any]) -> frozenset[str]:
    """The roles whose text a template drops where it is a string: it takes lists of parts alone. Asked of it once."""
    question = {"role": "user", "content": "question"}
    talks = {"system": 0, "user": 0, "assistant": 1}
    roles = set()
    for role, place in talks.items():
        talk = [question] if role == "user" else [question, question]
        talk[place] = {"role": role, "content": "mmfn-probe"}
        try:
            text, _ = run_template(program, talk, variables=variables)
        except BrokenTemplateError:
            raise
        except UserError:  # it does not take the role, or needs more: then the messages themselves will tell
            continue
        roles |= set() if "mmfn-probe" in text else {role}
    return frozenset(roles | ({"tool"} if "user" in roles else set()))


def plain_messages(messages: Iterable[Message], lists: Container[str] = ()) -> list[dict[str, Any]]:
    """Messages as templates take them: without null values, and text alone as a string, or in `lists` of roles a list.

    Some templates tell a string from a list of one text part, which says the same (Qwen3-Omni's adds an empty think
    block to the answer of the one, and GLM-4.5V's writes the other as Python does).
    """
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in plain:
        if "content" in message:
            message["content"] = _one_form(message["content"], message["role"] in lists)
    return plain


def run_template(
    program: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    is_prompt: bool = False,
    variables: Mapping[str, Any],
) -> tuple[str, Spans]:
    """(the text, the spans of its generation blocks; blocks that touch are one). `program`: see `with_marks`.

    `is_prompt` appends the header of an answer. Safe in any number of threads. Raises ValueError when the template
    rejects the messages, or is none.
    """
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), _ = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) if tools else None,
            chat_template=program,
            add_generation_prompt=is_prompt,
            **variables,
        )
    except TemplateSyntaxError as error:
        line = error.lineno - program.startswith(_MACRO)
        raise BrokenTemplateError(
            f"the chat template is no valid jinja ({error.message}, line {line}); correct it, or give another as "
            "data.template"
        ) from error
    except Exception as error:  # a template is a program: it may divide by zero, recurse, miss a key
        raise UserError(
            f"the chat template rejects these messages ({error}); correct their roles and order, or the template"
        ) from error
    return _take_marks(text)


def _take_marks(text: str) -> tuple[str, Spans]:
    pieces, marks = re.split(f"[{BEGIN}{END}]", text), re.findall(f"[{BEGIN}{END}]", text)
    if marks != [BEGIN, END] * (len(marks) // 2):
        raise UserError("the chat template has a generation block within another; put them side by side")
    spans: Spans = []
    place = 0
    for number, piece in enumerate(pieces):
        if number % 2:
            start = spans.pop()[0] if spans and spans[-1][1] == place else place
            spans.append((start, place + len(piece)))
        place += len(piece)
    return "".join(pieces), spans


def _one_form(content: Any, is_list: bool) -> Any:
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    return [{"type": "text", "text": content}] if is_list and isinstance(content, str) else content


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
