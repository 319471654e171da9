"""Text as it comes: whole characters, nothing of a stop, and joined exactly the text of all tokens."""

import random
from collections.abc import Sequence

import pytest

from mmfn.train.text_stream import TextStream

PIECES = ["a", " b", "\u00e9", "\u4f60\u597d", "\U0001f600", "\n", "END", "EN", "E", "N", "D", "stop", "sto", "p"]


def decode(tokens: Sequence[int]) -> str:
    """Bytes, as byte-level tokenizers do."""
    return bytes(tokens).decode("utf-8", errors="replace")


def until(text: str, stops: Sequence[str]) -> str:
    return text[: min([place for stop in stops if (place := text.find(stop)) >= 0], default=len(text))]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("stops", [(), ("END",), ("END", "stop", "\u597d", "EE"), ("\U0001f600",)])
def test_pieces_join_to_the_text(seed: int, stops: tuple[str, ...]) -> None:
    """Of random text cut anywhere, also within characters."""
    r = random.Random(seed)
    text = "".join(r.choice(PIECES) for _ in range(r.randint(0, 30)))
    data = text.encode()
    data = data[: r.randint(0, len(data))]
    want = until(data.decode("utf-8", errors="replace"), stops)
    stream, said = TextStream(decode, stops), ""
    for token in data:
        new = stream.push(token)
        said += new
        assert want.startswith(said)
        assert "\N{REPLACEMENT CHARACTER}" not in new
        if stream.has_ended:
            break
    assert said + stream.finish() == want
    assert stream.has_ended == (want != data.decode("utf-8", errors="replace"))


def test_text_is_said_as_soon_as_it_is_certain() -> None:
    stream = TextStream(decode, ["END"])
    tokens = "\u00e9 EN route EN".encode()
    said = [stream.push(token) for token in tokens]
    assert said == ["", "\u00e9", " ", "", "", "EN ", "r", "o", "u", "t", "e", " ", "", ""]
    assert stream.finish() == "EN"
    assert not stream.has_ended


def test_words_of_a_tokenizer_that_joins_them() -> None:
    """One that writes a space in front of every word but the first."""
    words = ["one", "two", "three"]
    stream = TextStream(lambda tokens: " ".join(words[token] for token in tokens))
    assert [stream.push(token) for token in (0, 1, 2)] == ["one", " two", " three"]
    assert stream.finish() == ""


def test_broken_bytes_are_said_when_they_are_certain() -> None:
    stream = TextStream(decode)
    assert [stream.push(token) for token in (0xFF, 0x61, 0xE2, 0x82)] == ["", "\ufffda", "", ""]
    assert stream.finish() == "\ufffd"


def test_nothing_comes_behind_a_stop() -> None:
    stream = TextStream(decode, ["b"])
    assert [stream.push(token) for token in b"abc"] == ["a", "", ""]
    assert stream.finish() == ""
