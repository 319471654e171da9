"""What a run says of chats: their template, what they are rendered with, and what of them is learned."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The settings of `data` of the same names; the defaults are what is published.

    `template`: a jinja file, or the name of a template that mmfn brings. `enable_thinking`: passed to the template;
    None: its own default. `train_on_prompt`: all tokens but those of media are learned. `mask_history`: of the answers
    only those behind the last user's message are. `train_empty_thinking`: whether a think block without a thought is
    learned. `video_outer_marks`: whether the template's marks around a video stay beside those of its frames.
    """

    template: str | None = None
    enable_thinking: bool | None = None
    train_on_prompt: bool = False
    mask_history: bool = False
    train_empty_thinking: bool = True
    video_outer_marks: bool = True


PUBLISHED = ChatOptions()
