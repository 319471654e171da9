"""The text of a row while its tokens come: characters when they are complete, up to the first text that ends it."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for bytes that are no character, or none yet


class TextStream:
    r"""What `push` and `finish` return, joined, is the text of all tokens, up to the first of `stops` in it.

    A token may end in the middle of a character, and a text may begin like a stop: both wait for what comes next.

    >>> stream = TextStream(lambda tokens: bytes(tokens).decode(errors="replace"), stops=["END"])
    >>> [stream.push(byte) for byte in "\u00e9 EN x END".encode()]
    ["", "\u00e9", " ", "", "", "EN ", "x", " ", "", "", ""]
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        """`decode`: tokens to text, of any run of tokens between complete characters."""
        self.decode, self.stops = decode, tuple(stops)
        self.has_ended = False
        self._tokens: list[int] = []
        self._before, self._read = 0, 0  # tokens of `_before` up to `_read` are read, those ahead of them done with
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain behind one more token; nothing once a stop has come."""
        self._tokens.append(token)
        return "" if self.has_ended else self._release(self._decoded(is_last=False), is_last=False)

    def finish(self) -> str:
        """The rest, of a character that is not complete too."""
        return "" if self.has_ended else self._release(self._decoded(is_last=True), is_last=True)

    def _decoded(self, *, is_last: bool) -> str:
        """The text of tokens that have not been read, if it is complete. The ones before tell how it is joined."""
        text = self.decode(self._tokens[self._before :])
        if text.endswith(BROKEN) and not is_last:
            return ""
        new = text[len(self.decode(self._tokens[self._before : self._read])) :]
        self._before, self._read = self._read, len(self._tokens)
        return new

    def _release(self, new: str, *, is_last: bool) -> str:
        text, self._held = self._held + new, ""
        if places := [place for stop in self.stops if (place := text.find(stop)) >= 0]:
            self.has_ended = True
            return text[: min(places)]
        if not is_last:
            most = max((_overlap(text, stop) for stop in self.stops), default=0)
            text, self._held = text[: len(text) - most], text[len(text) - most :]
        return text


def _overlap(text: str, stop: str) -> int:
    """How much of the end of a text the beginning of a stop is, at most."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
