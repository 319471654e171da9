"""How a model's conversations are written: what stands where a medium is, and templates that mark what is learned."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


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
class ChatFormat:
    """How a family's chats are written.

    `placeholders`: by kind of media, a regex of what chat templates write for one; a `MediaText` replaces the match.
    `tokens`: the tokens that stand for media or mark them, each by the key of its id in config.json. `templates`: names
    of training templates, tried in this order for a checkpoint whose own does not say what the assistant wrote.
    """

    placeholders: Mapping[str, str]
    tokens: Mapping[str, str]
    templates: tuple[str, ...]

    @property
    def pattern(self) -> re.Pattern[str]:
        """All placeholders; the name of the group that matched is the kind."""
        return re.compile("|".join(f"(?P<{kind}>{regex})" for kind, regex in self.placeholders.items()))


def read_template(name: str) -> str:
    """The jinja source of a training template: `templates/NAME.jinja` beside this file."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
