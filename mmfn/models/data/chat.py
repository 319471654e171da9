"""How a model's conversations are written: what stands where a medium is, what begins and ends a turn, templates."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_FOLDER = Path(__file__).parent / "templates"
_INCLUDE = re.compile(r"\{%- include '(\w+)' -%\}\n")


@dataclass(frozen=True, kw_only=True)
class MediaText:
    """What is written for a medium: `text`, in which a token that stands for features is written once, and `counts`.

    `counts`: how often each such token is repeated, in order. A video of two groups of frames with 6 features each:

    >>> MediaText(text="<0.2 seconds><|video_pad|><1.0 seconds><|video_pad|>", counts=(6, 6))
    """

    text: str
    counts: tuple[int, ...]


TextsByKind = Mapping[str, Sequence[MediaText]]  # "image", "video", "audio" -> texts in the order of their placeholders


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What chat templates write around the turns of a conversation.

    `header`: what begins an answer, and is not learned. `end`: a regex of what ends it, and is learned with it.
    `tokens`: tokens that begin or end a turn. `stops`: tokens that end a generated answer. No message may hold one of
    them. `closing`: what is appended where a template leaves the last answer open, behind (words, calls).
    `thinking`: what stands around a thought, before the words of an answer; None for a model that writes none.

    Two answers of a format whose turns end with the next one's role:

    >>> Marks(header="<|assistant|>", end=r"<\\|user\\|>", tokens=("<|assistant|>", "<|user|>"), stops=("<|user|>",))
    <|user|>hi<|assistant|>ho<|user|>and?<|assistant|>yes      learned: "ho<|user|>", "yes"
    """

    header: str
    end: str
    tokens: tuple[str, ...]
    stops: tuple[str, ...]
    closing: tuple[str, str] = ("", "")
    thinking: tuple[str, str] | None = None

    @property
    def boundary(self) -> re.Pattern[str]:
        """What ends an answer, in the group "end", or cuts it off."""
        return re.compile("|".join([f"(?P<end>{self.end})", *map(re.escape, self.tokens)]))

    @property
    def empty_thought(self) -> re.Pattern[str]:
        """A think block without a thought, and the line ends behind it."""
        before, after = map(re.escape, self.thinking or ("", ""))
        return re.compile(rf"{before}\n*{after}\n*")


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a family's chats are written.

    `placeholders`: by kind of media, a regex of what chat templates write for one; a `MediaText` replaces the match.
    `bare`: the same for kinds whose marks may be left out with it (`data.video_outer_marks`). `tokens`: the tokens that
    stand for media or mark them, each by the key of its id in config.json. `templates`: names of templates that mmfn
    brings, the first is for a checkpoint without one. `marks`: None where only generation blocks tell what was said.
    """

    placeholders: Mapping[str, str]
    tokens: Mapping[str, str]
    templates: tuple[str, ...]
    bare: Mapping[str, str] = field(default_factory=dict)
    marks: Marks | None = None

    @property
    def pattern(self) -> re.Pattern[str]:
        """All placeholders; the name of the group that matched is the kind."""
        return re.compile("|".join(f"(?P<{kind}>{regex})" for kind, regex in self.placeholders.items()))


def read_template(name: str) -> str:
    """The jinja source `templates/NAME.jinja` beside this file; a line `{%- include 'X' -%}` becomes that of X."""
    source = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda match: read_template(match[1]), source)
