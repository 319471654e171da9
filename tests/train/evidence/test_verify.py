"""`mmfn verify`: a card for real, one that expects what is not so, and every card of docs/evidence."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmfn import cli
from mmfn.train.evidence.card import STAGES

ROOT = Path(__file__).parents[3]
CARDS = {path.stem: path for path in sorted((ROOT / "docs" / "evidence" / "cards").glob("*.yaml"))}
SHORT = "qwen3_vl"  # the card of which the fast suite runs all stages but the longest
RUNS = [
    pytest.param(SHORT, ("import", "equality", "training", "export"), id=f"{SHORT}, short"),
    *(pytest.param(name, (), id=name, marks=pytest.mark.slow) for name in CARDS),
]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to start commands in, with what a clone of the project has of the cards."""
    for name in ("examples", "configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the processes that are started
    return tmp_path


@pytest.mark.dist
@pytest.mark.parametrize(("name", "only"), RUNS)
def test_a_card_passes(name: str, only: tuple[str, ...], clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [f"--only={stage}" for stage in only]
    assert cli.main(["verify", f"docs/evidence/cards/{name}.yaml", "--out", "card.md", *stages]) == 0
    printed = capsys.readouterr().out
    values = yaml.safe_load((clone / "card.yaml").read_text(encoding="utf-8"))
    card = yaml.safe_load(CARDS[name].read_text(encoding="utf-8"))
    parts = {"equality": card["equality"], **{kind: [card[kind]] for kind in STAGES if kind != "equality"}}
    expected = sum(len(part["expect"]) for kind in only or STAGES for part in parts[kind])
    assert f"\n{expected} of {expected} figures are as expected\n" in printed
    assert values["passed"] is True
    assert [line["passed"] for line in values["lines"]].count(True) == expected
    page = (clone / "card.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {card['title']}\n")
    assert page.count("| pass |") == expected
    for fact in (*values["machine"].values(), *values["versions"].values(), values["date"], values["model"]):
        assert fact in page


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples/every_family.py writes for the short card."""
    out = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        importlib.import_module("every_family").write_demo(out, SHORT)
    return out


def write_card(folder: Path, source: Path, **stages: Any) -> str:
    """A card of the model and data in `source` with these stages; its path."""
    places = {"model.path": "model", "data.train": "train.json", "data.eval": "eval.json"}
    card = {
        "title": "A card",
        "model": "Any.",
        "data": "Any.",
        "config": str(ROOT / "docs" / "evidence" / "demo.yaml"),
        "overrides": [f"{key}={source / name}" for key, name in places.items()] + [f"output.path={folder / 'run'}"],
        **stages,
    }
    path = folder / "a.yaml"
    path.write_text(yaml.safe_dump(card), encoding="utf-8")
    return str(path)


def test_a_figure_that_is_not_as_expected_is_named(
    model_and_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are measured all the same, and all of them written."""
    expect = {"logits": {"at_most": 1e-30}, "tokens": {"value": 1, "within": 2}, "tokens_apart": {"value": 0}}
    equality = {"layout": {"dp": 2}, "steps": 1, "expect": {"loss": {"at_most": 1e-12}}}
    path = write_card(tmp_path, model_and_data, **{"import": {"samples": 2, "expect": expect}, "equality": [equality]})
    assert cli.main(["verify", path]) == 2
    out, err = capsys.readouterr()
    assert f"{path}: import.logits is " in err
    assert f" but at most 1e-30 is expected, and 1 more; see {tmp_path / 'run' / 'card.md'}" in err
    assert "\n2 of 4 figures are as expected\n" in out
    values = yaml.safe_load((tmp_path / "run" / "card.yaml").read_text(encoding="utf-8"))
    assert values["passed"] is False
    found = {line["figure"]: (line["measured"], line["passed"]) for line in values["lines"]}
    assert {name: passed for name, (_, passed) in found.items()} == {
        "logits": False,
        "tokens_apart": True,
        "tokens": False,
        "loss": True,
        "grad_norm": None,
        "params": None,
        "optimizer": None,
    }
    assert 0 < found["logits"][0] < 1e-12
    assert found["loss"][0] < 1e-12
    assert "**fail**" in (tmp_path / "run" / "card.md").read_text(encoding="utf-8")


@pytest.mark.dist
@pytest.mark.slow
def test_real_ranks_meet_for_one_layout_after_the_other(
    model_and_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    expect = {name: {"at_most": 1e-10} for name in ("loss", "grad_norm", "params", "optimizer")}
    layouts = [{"cp": 2, "kind": "gather"}, {"cp": 2, "kind": "ring"}, {"dp": 2}]
    equality = [{"layout": layout, "ranks": "processes", "steps": 1, "expect": expect} for layout in layouts]
    assert cli.main(["verify", write_card(tmp_path, model_and_data, equality=equality)]) == 0


def test_a_checkpoint_that_is_read_wrong_is_seen(
    model_and_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value of one weight, off by a thousandth, in mmfn's reading alone."""
    from mmfn.train.evidence import library

    read = library.load_hf

    def off(*args: Any, **kwargs: Any) -> Any:
        model = read(*args, **kwargs)
        model.params["text"]["norm"]["weight"][3] *= 1.001
        return model

    monkeypatch.setattr(library, "load_hf", off)
    path = write_card(tmp_path, model_and_data, **{"import": {"expect": {"logits": {"at_most": 1e-9}}}})
    assert cli.main(["verify", path]) == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--only", "resume"], "--only resume but {path} has no such stage; it has import"),
        (["--out", "card.txt"], "--out 'card.txt' must end in .md; its values go to the same name with .yaml"),
        (["--out", "no/card.md"], "--out 'no/card.md' lies in a folder that does not exist; make the folder first"),
        (["model.pat=x"], "override: unknown key 'model.pat'; the nearest known key is 'model.path'"),
        (["model.path=absent"], "model.path 'absent' is no folder; give the folder of a Hugging Face checkpoint"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str],
    expected: str,
    model_and_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_card(tmp_path, model_and_data, **{"import": {"expect": {"logits": {"at_most": 1}}}})
    assert cli.main(["verify", path, *arguments]) == 2
    assert capsys.readouterr().err == f"mmfn: error: {expected.format(path=path)}\n"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("make it", "prepare runs 'make' but may run python or mmfn; correct it"),
        ("mmfn plan absent.yaml", "mmfn plan absent.yaml failed: cannot read config 'absent.yaml'"),
    ],
)
def test_what_cannot_be_prepared_is_said(
    command: str, expected: str, model_and_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {"expect": {"logits": {"at_most": 1}}}
    path = write_card(tmp_path, model_and_data, prepare=[command], **{"import": stage})
    assert cli.main(["verify", path]) == 2
    assert expected in capsys.readouterr().err


def test_export_needs_the_run_of_training(
    model_and_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_card(tmp_path, model_and_data, export={"expect": {"keys": {"value": 0}}})
    assert cli.main(["verify", path]) == 2
    assert "stage export reads the run of stage training; run that too, with data.eval set" in capsys.readouterr().err
