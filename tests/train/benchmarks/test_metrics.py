"""Scores against their published formulas, written down again, and rules of extraction case by case."""

import random
from fractions import Fraction
from functools import cache

import pytest

from mmfn.train.benchmarks.metrics import (
    anls,
    chosen_option,
    edit_distance,
    exact_match,
    open_answer,
    relaxed_accuracy,
)


def levenshtein(a: str, b: str) -> int:
    """By its recursive definition."""

    @cache
    def of(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return of(len(a), len(b))


@pytest.mark.parametrize("seed", range(40))
def test_anls_is_its_formula(seed: int) -> None:
    r = random.Random(seed)
    truth = "".join(r.choice("abcD \u00e9") for _ in range(r.randint(1, 9))).strip() or "a"
    answers = [truth, "".join(r.choice("abc") for _ in range(r.randint(1, 9)))]
    prediction = list(truth)
    for _ in range(r.randint(0, 6)):
        prediction.insert(r.randint(0, len(prediction)), r.choice("abcx"))
    text = "".join(prediction)
    plain = [" ".join(x.lower().split()) for x in (text, *answers)]
    distances = [Fraction(levenshtein(plain[0], x), max(len(plain[0]), len(x))) for x in plain[1:]]
    assert [edit_distance(plain[0], x) for x in plain[1:]] == [levenshtein(plain[0], x) for x in plain[1:]]
    want = max(1 - d if d < Fraction(1, 2) else Fraction(0) for d in distances)
    assert anls(text, answers) == pytest.approx(float(want), abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Hello  World", ["hello world"], 1.0),
        ("ab", ["abcd"], 0.0),  # a distance of exactly one half scores nothing
        ("abc", ["abcd"], 0.75),
        ("abc", ["x", "abcd", "abce"], 0.75),
        ("", ["a"], 0.0),
        ("a", [], 0.0),
    ],
)
def test_anls_by_hand(prediction: str, answers: list[str], score: float) -> None:
    assert anls(prediction, answers) == score


@pytest.mark.parametrize("seed", range(40))
def test_relaxed_accuracy_is_its_formula(seed: int) -> None:
    r = random.Random(seed)
    answer, factor = r.choice([r.randint(-200, 200), r.uniform(-5, 5)]), r.choice([0.94, 0.951, 1.0, 1.049, 1.06])
    prediction = answer * factor
    signs = r.choice([("", ""), ("%", "%")])
    a, p = (Fraction(float(x)) for x in (answer, prediction))
    want = abs(p - a) / abs(a) <= Fraction(1, 20) if a else str(prediction) + signs[0] == str(answer) + signs[1]
    assert relaxed_accuracy(f" {prediction}{signs[0]} ", [f"{answer}{signs[1]}"]) == float(want)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("105", "100", 1.0),
        ("95", "100", 1.0),
        ("105.1", "100", 0.0),
        ("94.9", "100", 0.0),
        ("12%", "0.12", 1.0),
        ("12", "12%", 0.0),
        ("-10", "10", 0.0),
        ("0", "0", 1.0),
        ("0.0", "0", 0.0),  # an answer of 0 compares as text
        ("Blue", "blue", 1.0),
        ("blue.", "blue", 0.0),
        ("10 apples", "10", 0.0),
        ("ten", "10", 0.0),
        ("nan", "10", 0.0),
        ("inf", "10", 0.0),
    ],
)
def test_relaxed_accuracy_by_hand(prediction: str, answer: str, score: float) -> None:
    assert relaxed_accuracy(prediction, [answer]) == score
    assert relaxed_accuracy(prediction, ["other", answer]) == score


OPTIONS = {"A": "The moon", "B": "A star", "C": "Mars", "D": "Mars and the moon"}


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (C) ", "C"),
        ("**D**", "D"),
        ("A.", "A"),
        ("B. A star", "B"),
        ("B) A star", "B"),
        ("(B) A star", "B"),
        ("C\nbecause it is red", "C"),
        ("The answer is (b), not C.", "B"),
        ("Answer: D", "D"),
        ("I thought the answer is A. No: the answer is C", "C"),
        ("It must be option B", "B"),
        ("It looks like (C) to me", "C"),
        ("(A) or (B), who knows", "A"),
        ("either (B) or (A), who knows", ""),
        ("a star", "B"),
        ("A star.", "B"),
        ("it is the moon!", "A"),
        ("I see mars and the moon", ""),  # three of them stand in it
        ("A dog runs", ""),
        ("E", ""),
        ("the answer is E", ""),
        ("answer is Bob", ""),
        ("", ""),
    ],
)
def test_the_option_that_is_meant(prediction: str, letter: str) -> None:
    assert chosen_option(prediction, OPTIONS) == letter


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("42", ["42"], 1.0),
        ("x = 42.001", ["42"], 1.0),
        ("First 3.\nSo the answer is 1,200.", ["1200"], 1.0),
        ("the answer: blue", ["Blue.", "azure"], 1.0),
        ("$3.50", ["3.5"], 1.0),
        ("blueish", ["blue"], 0.0),
        ("41", ["42"], 0.0),
        ("", ["42"], 0.0),
    ],
)
def test_open_answers(prediction: str, answers: list[str], score: float) -> None:
    assert open_answer(prediction, answers) == score


def test_exact_match() -> None:
    assert exact_match(" A  b\n", ["x", "a B"]) == 1.0
    assert exact_match("a b.", ["a b"]) == 0.0
