"""Scores of an answer against those that are right, each a function to [0, 1] with its formula."""

import re
import unicodedata
from collections.abc import Mapping, Sequence

TOLERANCE = 0.05  # of a number, in relaxed accuracy
THRESHOLD = 0.5  # of a normalised distance, from which on an answer scores nothing


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction is one of the answers, but for case and white space, else 0."""
    return float(_plain(prediction) in map(_plain, answers))


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction is a number within 5 % of an answer, or else the same text but for case; else 0.

    `|p - a| <= 0.05 |a|`, where `12%` is 0.12. An answer that is 0 or no number, or a prediction that is none, compares
    as text. Source: Masry et al., "ChartQA" (2022), section 4.1, after Methani et al., "PlotQA" (2020).
    """
    return float(any(_is_close(prediction.strip(), answer.strip()) for answer in answers))


def anls(prediction: str, answers: Sequence[str]) -> float:
    """The largest over answers of `1 - d` where `d < 0.5`, else 0; `d`: edits that make one the other, over the length
    of the longer one; case and runs of white space do not count. Its mean over questions is ANLS.

    Source: Biten et al., "Scene text visual question answering" (2019), equation 1.
    """
    return max((_similarity(_plain(prediction), _plain(answer)) for answer in answers), default=0.0)


def open_answer(prediction: str, answers: Sequence[str]) -> float:
    """1 where what the prediction concludes is one of the answers, else 0.

    That is its last line, or what stands behind the last "answer is", "answer:" or "=" in it; compared without case,
    white space and a full stop at the end, and as numbers, to two decimals, where both are some.
    """
    last = next((line for line in reversed(prediction.splitlines()) if line.strip()), "")
    concluded = re.split(r"answer is:?|answer:|=", last, flags=re.IGNORECASE)[-1]
    return float(any(_is_same(text, answer) for text in (prediction, last, concluded) for answer in answers))


def chosen_option(prediction: str, options: Mapping[str, str]) -> str:
    """The letter of the option that a prediction means, "" for none. The first of these rules that finds one does:

    1. all of it is a letter: `B`, `(B)`, `B.`, `**B**`; 2. it begins with one: `B. the moon`, `(B) the moon`;
    3. the last of `answer is B`, `answer: (B)`, `option B`; 4. `(B)`, if no other letter stands so;
    5. it is the text of one option; 6. the text of one option alone stands in it as words.
    Letters are those of the options; they are capitals, but for rules 1 and 3.
    """
    text = prediction.strip().strip("*").strip()
    letters = "".join(options)
    if alone := re.fullmatch(rf"[\s(\[{{*]*([{letters}])[\s)\]}}*.:,]*", text, re.IGNORECASE):
        return alone[1].upper()
    if first := re.match(rf"(?:\(([{letters}])\)|([{letters}])(?:[.:)]|\s*\n))", text):
        return first[1] or first[2]
    said = re.findall(rf"(?:answer(?: is|:)|option)[\s:*(\[]*([{letters}])(?![\w'])", text, re.IGNORECASE)
    if said:
        return str(said[-1]).upper()
    if len(bracketed := set(re.findall(rf"\(([{letters}])\)", text))) == 1:
        return str(bracketed.pop())
    plain = {letter: _plain(option).rstrip(".") for letter, option in options.items()}
    same = [letter for letter, option in plain.items() if option == _plain(text).rstrip(".")]
    inside = [letter for letter, option in plain.items() if option and _has_words(_plain(text), option)]
    return next((found[0] for found in (same, inside) if len(found) == 1), "")


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def _number(text: str) -> float | None:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _is_close(prediction: str, answer: str) -> bool:
    a, b = _number(prediction), _number(answer)
    if a is not None and b:
        return abs(a - b) <= TOLERANCE * abs(b)
    return prediction.lower() == answer.lower()


def _is_same(prediction: str, answer: str) -> bool:
    texts = [_plain(text).rstrip(".") for text in (prediction, answer)]
    numbers = [_number(text.replace(",", "").strip("$ ")) for text in texts]
    if numbers[0] is not None and numbers[1] is not None:
        return round(numbers[0], 2) == round(numbers[1], 2)
    return texts[0] == texts[1]


def _similarity(a: str, b: str) -> float:
    distance = edit_distance(a, b) / max(len(a), len(b), 1)
    return 1 - distance if distance < THRESHOLD else 0.0


def edit_distance(a: str, b: str) -> int:
    """The fewest characters to insert, remove or replace that make one text the other (Levenshtein, 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def _has_words(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None
