"""Cards as files: what is wrong in one is one sentence; those of docs/evidence are filled in as they are today."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import cards
from mmfn.models import FAMILIES
from mmfn.train.evidence.card import Bound, ExportStage, read_card
from mmfn.train.evidence.findings import lines_of

ROOT = Path(__file__).parents[3]
GOOD = """\
title: A card
model: Any.
data: Any.
config: a.yaml
import:
  expect:
    logits: {at_most: 1e-9}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_card_is_read(tmp_path: Path) -> None:
    card = read_card(write(tmp_path, GOOD))
    assert list(card.stages) == ["import"]
    assert card.stages["import"][0].expect == {"logits": Bound(at_most=1e-9)}
    assert card.import_ is not None
    assert card.import_.samples == 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("title: A card\n", ""), "1: title is required; give it"),
        (("title: A card", "title: 3"), "1: title is 3 but input should be a valid string; correct it"),
        (("import:", "imports:"), "5: unknown key 'imports'; see docs/evidence/README.md for those there are"),
        (("logits:", "logit:"), "5: import: 'logit' is no figure of this stage; the nearest is 'logits'"),
        (("{at_most: 1e-9}", "{}"), "7: import.expect.logits: it expects nothing; give at_most, at_least or value"),
        (("at_most", "at_mos"), "7: unknown key 'import.expect.logits.at_mos'; see "),
        (
            ("{at_most: 1e-9}", "{at_most: 1, within: 1}"),
            "7: import.expect.logits: within has no effect without value; give ",
        ),
        (("logits: {at_most: 1e-9}", "{}"), "6: import.expect is {} but dictionary should have at least 1 item "),
        (("import:\n  expect:\n    logits: {at_most: 1e-9}\n", ""), "1: it has no stage; give one of import, "),
        (("title: A card", "title: A card\ntitle: B"), " is no valid YAML: "),
        (("title: A card", "title: [A"), " is no valid YAML: "),
    ],
)
def test_what_is_wrong_in_a_card_is_one_sentence(change: tuple[str, str], expected: str, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace(*change))
    with pytest.raises(ValueError, match=r"a\.yaml") as caught:
        read_card(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}{'' if expected.startswith(' ') else ':'}{expected}"), sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("kill_at", "save_every", "expected"),
    [(2, 3, "between save_every and steps"), (9, 3, "between save_every"), (5, 4, "must divide steps 9")],
)
def test_a_kill_is_between_a_save_and_the_end(kill_at: int, save_every: int, expected: str, tmp_path: Path) -> None:
    numbers = {"steps": 9, "save_every": save_every, "kill_at": kill_at}
    stage = {"resume": {**numbers, "expect": {"steps_apart": {"value": 0}}}}
    with pytest.raises(ValueError, match=expected):
        read_card(write(tmp_path, GOOD + yaml.safe_dump(stage)))


@pytest.mark.parametrize(
    ("bound", "passing", "failing", "text"),
    [
        (Bound(at_most=2), (-9.0, 2.0), (2.1, float("nan"), float("inf")), "at most 2"),
        (Bound(at_least=1, at_most=2), (1.0, 2.0), (0.9, 2.1, float("nan")), "at most 2, at least 1"),
        (Bound(value=0), (0.0,), (1e-30, float("nan")), "0"),
        (Bound(value=1, within=0.5), (0.5, 1.5), (0.4, 1.6, float("nan")), "1 +- 0.5"),
    ],
)
def test_a_bound(bound: Bound, passing: tuple[float, ...], failing: tuple[float, ...], text: str) -> None:
    assert str(bound) == text
    assert all(bound.holds(value) for value in passing)
    assert not any(bound.holds(value) for value in failing)


def test_a_figure_that_was_not_measured_fails() -> None:
    stage = ExportStage(expect={"keys": Bound(value=0)})
    missing, other = lines_of(stage, "export", "", {"logits": 1e-9})
    assert (missing.figure, missing.passed) == ("keys", False)
    assert (other.figure, other.passed, other.expected) == ("logits", None, "")


# ---- those of docs/evidence


def test_the_index_is_that_of_today() -> None:
    assert cards.PAGE.read_text(encoding="utf-8") == cards.page(), "run make evidence"


@pytest.mark.parametrize("name", cards.CARDS)
def test_a_filled_card_is_of_the_card_as_it_is(name: str) -> None:
    values = cards.findings_of(name)
    card = read_card(cards.CARDS[name])
    assert values["card"] == card.model_dump(mode="json", exclude_defaults=True), "run make evidence"
    assert values["passed"] is True
    assert values["path"] == f"docs/evidence/cards/{name}.yaml"
    assert (values["overrides"], values["only"]) == ([], [])
    for kind, stages in card.stages.items():
        measured = {line["figure"] for line in values["lines"] if line["stage"] == kind and line["passed"]}
        assert measured == {figure for stage in stages for figure in stage.expect}
    assert f"# {card.title}\n" in (cards.FOLDER / f"{name}.md").read_text(encoding="utf-8")


@pytest.fixture
def every_family(monkeypatch: pytest.MonkeyPatch) -> Any:
    """examples/every_family.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("every_family")


def test_every_family_has_a_card(every_family: Any) -> None:
    published = {name: every_family.tiny_config(name)["model_type"] for name in every_family.PUBLISHED}
    assert {model_type.removesuffix("_thinker") for model_type in published.values()} == set(FAMILIES)
    assert set(cards.CARDS) == set(published)


def test_a_tiny_model_is_published_but_for_its_sizes(every_family: Any) -> None:
    """Whatever differs is a size, a number of tokens or of rope's sections, or where a layer is."""
    sizes = {key for part in every_family.SIZES.values() for key in part}
    others = {"mrope_section", "deepstack_visual_indexes", "dtype", "architectures"}
    for name, folder in every_family.PUBLISHED.items():
        hf = json.loads((ROOT / "configs" / "models" / folder / "config.json").read_text(encoding="utf-8"))
        tiny = every_family.tiny_config(name)
        assert changed(hf.get("thinker_config", hf), tiny) <= sizes | others, name


def changed(one: Any, other: Any, key: str = "") -> set[str]:
    """Names of the innermost keys whose values differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return set() if one == other else {key}
    return set().union(*(changed(one.get(key), other.get(key), key) for key in one.keys() | other.keys()))


def test_what_a_card_prepares_is_the_same_each_time(every_family: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        every_family.write_demo(tmp_path / name, "qwen3_omni")
    first, second = (
        {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("a", "b")
    )
    assert first == second
    assert {"train.json", "eval.json", "model/model.safetensors", "model/tokenizer.json"} <= first.keys()
    asked = {entry["messages"][1]["content"] for entry in json.loads(first["train.json"])}
    assert asked == {*every_family.COLOURS, *every_family.HERTZ}
