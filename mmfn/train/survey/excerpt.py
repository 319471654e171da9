"""How a sample reads: its tokens as text again, with what is learned of it, and its media as so many tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from mmfn.batch import IGNORE, TEXT, Sample
from mmfn.train.data.tokenizer import Tokenizer

GREEN, CYAN, PLAIN = "\033[32m", "\033[36m", "\033[0m"


@dataclass(frozen=True, kw_only=True)
class Span:
    """Neighbouring tokens of one kind. `num`: how many, where they stand for a medium and `text` is one of them; 0."""

    text: str
    is_trained: bool
    num: int = 0


def spans(sample: Sample, tokenizer: Tokenizer) -> Iterator[Span]:
    """The whole of a sample, in order: text as it was tokenized, all special tokens shown."""
    is_trained_T = sample.labels_T != IGNORE
    marks_T2 = torch.stack([sample.kinds_T, is_trained_T.to(torch.int64)], 1)
    runs_R2, lengths_R = torch.unique_consecutive(marks_T2, dim=0, return_counts=True)
    pieces = torch.split(sample.tokens_T, lengths_R.tolist())
    for (kind, is_trained), tokens in zip(runs_R2.tolist(), pieces, strict=True):
        text = tokenizer.decode((tokens if kind == TEXT else tokens[:1]).tolist(), skip_special_tokens=False)
        yield Span(text=text, is_trained=bool(is_trained), num=0 if kind == TEXT else len(tokens))


def on_terminal(parts: Iterable[Span], *, is_coloured: bool) -> str:
    """Learned text in green and media in cyan; without colours between ⟦ and ⟧, and as `<token> x 256`."""
    texts = []
    for span in parts:
        if span.num:
            text = f"[{span.text} x {span.num}]"
            texts.append(f"{CYAN}{text}{PLAIN}" if is_coloured else text)
        elif span.is_trained:
            texts.append(f"{GREEN}{span.text}{PLAIN}" if is_coloured else f"⟦{span.text}⟧")
        else:
            texts.append(span.text)
    return "".join(texts)
