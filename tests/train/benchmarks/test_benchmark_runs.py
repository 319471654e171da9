"""`mmfn eval --tsv`: tables of every benchmark, on several ranks, gone on with after an interruption."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import mmfn
from mmfn import arguments, cli, tree
from mmfn.interop.checkpoint import read_config
from mmfn.train.benchmarks import run as benchmark_run
from mmfn.train.benchmarks.questions import BENCHMARKS
from mmfn.train.benchmarks.xlsx import FORBIDDEN
from tests.train.benchmarks.files import FILES
from tests.train.benchmarks.test_xlsx import read
from tests.train.test_processes import finish, start

Table = list[dict[str, str]]
Evaluate = Callable[..., str]


@pytest.fixture(scope="module")
def checkpoint(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = mmfn.init(read_config(small_demo / "model"), seed=3)
    wider = replace(model, params=tree.map(lambda x: x * 4 if x.ndim > 1 else x, model.params))
    mmfn.save_hf(folder, wider, assets=small_demo / "model")
    return folder


@pytest.fixture
def evaluate(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """What `mmfn eval --tsv` prints into the folder `out`, or, with code 2, its error."""

    def call(kind: str, *args: str, out: str = "out", code: int = 0) -> str:
        file = str(FILES[kind](tmp_path / f"{kind}.tsv"))
        settings = ["eval.max_new_tokens=4", "--tsv", file, "--benchmark", kind, "--out", str(tmp_path / out), *args]
        assert cli.main(["eval", str(checkpoint), *settings]) == code
        printed, error = capsys.readouterr()
        return error if code else printed

    return call


def table(path: Path) -> Table:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", FILES)
def test_tables(kind: str, evaluate: Evaluate, tmp_path: Path) -> None:
    """The summary is that of the items, and the workbook says what the CSV files say."""
    lines = evaluate(kind).splitlines()
    items, summary = (table(tmp_path / "out" / f"{name}.csv") for name in ("items", "summary"))
    scores = [float(item["score"]) for item in items]
    assert lines[-2] == (
        f"{BENCHMARKS[kind].metric} of {kind}: {sum(scores) / len(scores):.4f} ({len(items)} questions)"
    )
    assert summary[0] == {"group": "all", "value": "", "questions": str(len(items)), "score": summary[0]["score"]}
    assert float(summary[0]["score"]) == pytest.approx(sum(scores) / len(scores), abs=1e-12)
    for row in summary[1:]:
        own = [float(item["score"]) for item in items if item[row["group"]] == row["value"]]
        assert (int(row["questions"]), float(row["score"])) == (len(own), pytest.approx(sum(own) / len(own)))
    sheets = read(tmp_path / "out" / "results.xlsx")
    for name, rows in (("items", items), ("summary", summary)):
        cells = [str(value) for value in sheets[name].values()]
        wanted = [*rows[0], *(value for row in rows for value in row.values())]
        assert [number(cell) for cell in cells] == [number(value) for value in wanted]


def number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return FORBIDDEN.sub("", text)


@pytest.mark.parametrize("kind", FILES)
def test_right_answers_score_1(kind: str, evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "ai2d": ["A", "B.", "(C)", "The answer is D", "a leaf"],
        "chartqa": ["14", "0.5%", "blue"],
        "docvqa": ["J. Doe", "1999", "rome"],
        "mmmu": ["B", "A", "seven"],
    }[kind]
    monkeypatch.setattr(benchmark_run, "answer_prompts", lambda *args, rows, **kwargs: [answers[row] for row in rows])
    evaluate(kind)
    assert {row["score"] for row in table(tmp_path / "out" / "summary.csv")} == {"1.0"}


@pytest.mark.dist
def test_ranks_share_the_questions(evaluate: Evaluate, checkpoint: Path, tmp_path: Path) -> None:
    """Three ranks hold a third of the model each and write what one writes."""
    evaluate("mmmu", out="one")
    settings = ["eval.max_new_tokens=4", "eval.batch_samples=1", "--tsv", str(tmp_path / "mmmu.tsv")]
    settings += ["--benchmark", "mmmu", "--out", str(tmp_path / "three")]
    ranks = finish(start(3, "eval", str(checkpoint), *settings))
    assert [(code, errors) for code, _, errors in ranks] == [(0, "")] * 3
    assert [bool(output) for _, output, _ in ranks] == [True, False, False]
    for name in ("items.csv", "summary.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_an_interrupted_run_goes_on(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """What is answered stays, a line that was cut off is answered again, and nothing else is."""
    evaluate("ai2d", out="whole")
    evaluate("ai2d", "eval.batch_samples=2")
    path = tmp_path / "out" / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4])[: -cut or None])
    rows: list[int] = []
    answer = benchmark_run.answer_prompts

    def watched(*args: object, **kwargs: object) -> list[str]:
        rows.extend(kwargs["rows"])
        return answer(*args, **kwargs)

    monkeypatch.setattr(benchmark_run, "answer_prompts", watched)
    evaluate("ai2d")
    assert rows == ([3, 4] if cut == 0 else [2, 3, 4])
    for name in ("items.csv", "summary.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows.clear()
    evaluate("ai2d")  # all is answered
    assert rows == []


def test_answers_of_something_else_are_no_beginning(evaluate: Evaluate) -> None:
    evaluate("chartqa")
    for args in (["eval.max_new_tokens=5"], ["--instruction", "Say it."]):
        assert "holds answers of another model, file or setting" in evaluate("chartqa", *args, code=2)
    assert "holds answers of another" in evaluate("docvqa", code=2)


def test_the_first_questions_alone(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate("ai2d", "--max-samples", "2")
    assert [item["id"] for item in table(tmp_path / "out" / "items.csv")] == ["0", "1"]
    evaluate("ai2d")  # goes on with the others
    assert [item["id"] for item in table(tmp_path / "out" / "items.csv")] == ["0", "1", "2", "3", "4"]
    assert "--max-samples is 0 but must be at least 1" in evaluate("ai2d", "--max-samples", "0", code=2)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--tsv", "x.tsv"], "mmfn eval --tsv needs --benchmark, one of ai2d, chartqa"),
        (["--tsv", "x.tsv", "--benchmark", "ai2d"], "and --out, a folder for the results"),
        (["--tsv", "none.tsv", "--benchmark", "ai2d", "--out", "o"], "cannot read 'none.tsv'"),
        (["--benchmark", "ai2d"], "--benchmark has no effect without --tsv"),
        (["--max-samples", "3"], "--max-samples has no effect without --tsv"),
    ],
)
def test_arguments_that_make_no_sense(
    args: list[str], expected: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(checkpoint), *args]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error


def test_the_command_line_knows_the_benchmarks() -> None:
    assert tuple(BENCHMARKS) == arguments.BENCHMARKS
