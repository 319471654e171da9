"""`mmfn generate`: one prompt, files of prompts, streams, stops, what is drawn, and several ranks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import mmfn
from mmfn import cli, tree
from mmfn.interop.checkpoint import read_config
from tests.train.test_processes import finish, start

Ask = Callable[..., str]


@pytest.fixture(scope="module")
def checkpoint(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose logits are far apart, so that its answers hang on what it is asked."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = mmfn.init(read_config(small_demo / "model"), seed=3)
    wider = replace(model, params=tree.map(lambda x: x * 4 if x.ndim > 1 else x, model.params))
    mmfn.save_hf(folder, wider, assets=small_demo / "model")
    return folder


@pytest.fixture
def ask(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """What `mmfn generate` prints, or, with code 2, its error."""

    def call(*args: str, code: int = 0) -> str:
        assert cli.main(["generate", str(checkpoint), *args]) == code
        out, err = capsys.readouterr()
        return err if code else out

    return call


@pytest.fixture
def prompts(small_demo: Path, tmp_path: Path) -> Path:
    """Seven conversations, some with an image, some that end in an answer."""
    lines = []
    for i, entry in enumerate(json.loads((small_demo / "eval.json").read_text())[:7]):
        entry = {"id": f"entry {i}", "messages": entry["messages"], "images": entry["images"]}
        if i % 2:
            entry["messages"] = entry["messages"][:-1]
        if i % 3 == 0:
            entry = {"id": f"entry {i}", "messages": [{"role": "user", "content": f"What is {i}?"}]}
        lines.append(json.dumps(entry) + "\n")
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    return tmp_path / "prompts.jsonl"


def lines_of(text: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_stream_is_the_answer(ask: Ask) -> None:
    settings = ("hello", "--max-new-tokens", "12", "--temperature", "1.0")
    whole = ask(*settings)
    assert whole.strip()
    assert ask(*settings, "--stream").strip() == whole.strip()
    assert ask(*settings, "--seed", "1") != whole


def test_an_answer_ends_ahead_of_a_text(ask: Ask) -> None:
    settings = ("hello", "--max-new-tokens", "40", "--temperature", "2.0")
    whole = ask(*settings).strip()
    stop = whole[len(whole) // 2 :][:2]
    assert ask(*settings, "--stop", "not in it", "--stop", stop) == whole[: whole.index(stop)].strip() + "\n"
    assert ask(*settings, "--stop", stop, "--stream").strip() == whole[: whole.index(stop)].strip()


def test_answers_to_a_file_of_prompts(ask: Ask, prompts: Path, small_demo: Path) -> None:
    """In its order, whatever the batch; as one prompt is answered."""
    settings = ("--max-new-tokens", "6", "--set", f"data.root={(small_demo / 'images').resolve().parent}")
    found = lines_of(ask("--prompts", str(prompts), *settings))
    assert [line["id"] for line in found] == [f"entry {i}" for i in range(7)]
    assert found == lines_of(ask("--prompts", str(prompts), *settings, "--set", "eval.batch_samples=3"))
    assert found[3]["answer"] == ask("What is 3?", "--max-new-tokens", "6").strip()
    entry = json.loads((small_demo / "eval.json").read_text())[1]
    image = str((small_demo / "images").resolve().parent / entry["images"][0])
    question = entry["messages"][0]["content"].replace("<image>", "")
    assert found[1]["answer"] == ask(question, "--image", image, "--max-new-tokens", "6").strip()


@pytest.mark.dist
@pytest.mark.parametrize("drawn", [(), ("--temperature", "1.5", "--seed", "4")])
def test_ranks_share_a_file_of_prompts(
    ask: Ask, checkpoint: Path, prompts: Path, small_demo: Path, drawn: tuple[str, ...]
) -> None:
    """Three ranks hold a third of the model each; the last round of prompts is for one of them."""
    root = f"data.root={(small_demo / 'images').resolve().parent}"
    settings = ("--prompts", str(prompts), "--max-new-tokens", "20", "--set", root, *drawn)
    ranks = finish(start(3, "generate", str(checkpoint), *settings, "--set", "eval.batch_samples=1"))
    assert [(code, errors) for code, _, errors in ranks] == [(0, "")] * 3
    assert [output for _, output, _ in ranks[1:]] == ["", ""]
    assert lines_of(ranks[0][1]) == lines_of(ask(*settings))


@pytest.mark.dist
def test_one_prompt_on_several_ranks(ask: Ask, checkpoint: Path) -> None:
    """The first rank answers; the others compute along and say nothing."""
    settings = ("hello", "--max-new-tokens", "20", "--temperature", "1.0", "--stop", "q", "--stream")
    ranks = finish(start(2, "generate", str(checkpoint), *settings))
    assert [(code, errors) for code, _, errors in ranks] == [(0, "")] * 2
    assert [output for _, output, _ in ranks] == [ask(*settings), ""]


def test_the_checkpoint_says_how_it_is_sampled_where_it_is_asked_to(ask: Ask, checkpoint: Path) -> None:
    settings, stored = ("hello", "--max-new-tokens", "12"), {"do_sample": True, "temperature": 1.5, "top_p": 0.9}
    file = checkpoint / "generation_config.json"
    greedy = ask(*settings)
    before = file.read_text() if file.exists() else "{}"
    try:
        file.write_text(json.dumps({**json.loads(before), **stored}))
        assert ask(*settings) == greedy
        drawn = ask(*settings, "--sampling", "checkpoint")
        assert drawn == ask(*settings, "--temperature", "1.5", "--top-p", "0.9", "--top-k", "50") != greedy
        assert ask(*settings, "--sampling", "checkpoint", "--temperature", "0") == greedy
        file.write_text(json.dumps({**json.loads(before), **stored, "top_p": "high"}))
        assert "top_p is 'high' in" in ask(*settings, "--sampling", "checkpoint", code=2)
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "mmfn generate needs a PROMPT or --prompts FILE, one of the two"),
        (["hi", "--prompts", "x.jsonl"], "one of the two"),
        (["--prompts", "x.jsonl", "--image", "a.png"], "--image has no effect beside --prompts"),
        (["hi", "--top-p", "0.5"], "--top-p has no effect on greedy answers; give --temperature"),
        (["hi", "--temperature", "-1"], "temperature is -1.0 but must be at least 0"),
        (["hi", "--stop", ""], "a text that ends answers is empty"),
        (["hi", "--set", "optimizer.lr=1"], "optimizer.lr has no effect here, where nothing is trained"),
        (["hi", "--set", "data.workers=2"], "data.workers has no effect here"),
        (["hi", "--set", "eval.every=3"], "eval.every has no effect here, where nothing is trained; remove it"),
        (["hi", "--set", "eval.max_new_tokens=2"], "where nothing is trained; give --max-new-tokens"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["hi", "--video", "none.mp4"], "none.mp4"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(ask: Ask, args: list[str], expected: str) -> None:
    error = ask(*args, code=2)
    assert error.startswith("mmfn: error: ")
    assert error.count("\n") == 1
    assert expected in error
