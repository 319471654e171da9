"""`mmfn plan` as a command: where sizes come from, what a search leaves out, and what is refused before work begins."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfn import cli
from mmfn.train.planning import request
from mmfn.train.planning import search as plan_search
from tests.parallel.plan_cases import hf_config

SMALL = ["--tokens", "64", "--sample-tokens", "32", "--image-side", "4", "--device", "cpu"]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`call(*arguments)` runs `mmfn plan` beside `1.7/config.json`, a folder whose name YAML reads as a number."""
    (tmp_path / "1.7").mkdir()
    (tmp_path / "1.7" / "config.json").write_text(json.dumps(hf_config()))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["plan", *arguments])
        return code, *capsys.readouterr()

    return run


def sentence(answer: tuple[int, str, str]) -> str:
    """What was said by a command that ended before it did anything."""
    code, out, err = answer
    assert (code, out) == (2, "")
    assert err.startswith("mmfn: error: ")
    assert err.count("\n") == 1
    return err


def test_settings_of_several_ranks_are_checked_with_them(call: Call) -> None:
    chosen = ["layout.head=sharded", "layout.prefetch=false"]
    code, out, _ = call("1.7/config.json", *SMALL, *chosen, "--world", "2")
    assert code == 0
    assert out.startswith("1.7/config.json: dp 2 (2 ranks)")
    assert "vocabulary_parallel: 500 of 1000 rows" in out
    alone = call("1.7/config.json", *SMALL, "layout.dp=2", "layout.head=sharded", "--world", "1")
    assert alone[::2] == (0, "")
    assert alone[1].startswith("note: layout.head has no effect with dp 1 and cp 1; remove it or change that\n1.7/")
    assert "layout.cp is 'x' but" in sentence(call("1.7/config.json", *SMALL, "layout.cp=x", "--world", "2"))


def test_candidates_are_checked_with_what_is_given(call: Call) -> None:
    settings = request.read("1.7/config.json", ["layout.kind=ring", "layout.head=sharded"])
    layouts = [config.layout for config in plan_search.candidates(settings, 2)]
    assert [(n.dp, n.cp, n.kind, n.head, n.remat) for n in layouts] == [
        (1, 2, "ring", "sharded", "none"),
        (1, 2, "ring", "sharded", "full"),
    ]
    none = sentence(call("1.7/config.json", *SMALL, "--search", "--world", "2", "layout.capacity=1.5"))
    assert "no layout of 2 ranks fits" in none
    assert "capacity has no effect with ep 1" in none
    wrong = sentence(call("1.7/config.json", *SMALL, "--search", "--world", "2", "optimizer.lr=0"))
    assert "optimizer.lr is 0 but" in wrong


@pytest.mark.parametrize(
    ("world", "ep", "cp"),
    [
        (2, [1, 2], [1, 2]),
        (4, [1, 2, 4], [1, 2, 4]),
        (6, [1, 2, 3, 6], [1, 2, 3, 6]),
        (12, [1, 2, 3, 4, 6, 12], [1, 2, 3, 4, 6, 12]),
    ],
)
def test_every_divisor_is_tried(tmp_path: Path, world: int, ep: list[int], cp: list[int]) -> None:
    """Of a model of 24 experts, whose 8 heads ulysses must divide: so many layouts are refused, and said."""
    hf = hf_config(moe=True)
    hf["text_config"]["num_experts"] = 24
    (tmp_path / "config.json").write_text(json.dumps(hf))
    said: list[str] = []
    settings = request.read(str(tmp_path / "config.json"), [])
    layouts = [config.layout for config in plan_search.candidates(settings, world, said.append)]
    assert sorted({layout.ep for layout in layouts}) == ep
    assert sorted({layout.cp for layout in layouts}) == cp
    assert {layout.world for layout in layouts} == {world}
    spreads = [layout.cp * layout.ep for layout in layouts]
    assert spreads == sorted(spreads)
    assert all(8 % layout.cp == 0 for layout in layouts if layout.kind == "ulysses")
    assert sorted({layout.cp for layout in layouts if layout.kind == "usp"}) == [n for n in cp if n > 2 and n % 2 == 0]
    refused = [line for line in said if re.match(r"left out \d+ layouts that are refused, the first because ", line)]
    assert said == refused
    assert bool(refused) == (world % 3 == 0)


def test_a_search_says_what_is_beyond_its_reach(tmp_path: Path) -> None:
    hf = hf_config(moe=True)
    hf["text_config"] |= {"num_experts": 128, "num_attention_heads": 64, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    settings = request.read(str(tmp_path / "config.json"), [])
    said: list[str] = []
    layouts = [config.layout for config in plan_search.candidates(settings, 256, said.append)]
    assert 300 < len(layouts) <= plan_search.MOST
    most = max(layout.cp * layout.ep for layout in layouts)
    (line,) = said
    assert re.fullmatch(
        rf"left out \d+ layouts with cp \* ep of {2 * most} and more: a search plans at most 480; .*", line
    )
    some = request.read(str(tmp_path / "config.json"), ["layout.cp=1", "layout.replicate=1"])
    said.clear()
    assert [c.layout.ep for c in plan_search.candidates(some, 256, said.append)][::2] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert said == []


def test_a_search_says_once_what_overrides_idle(tmp_path: Path) -> None:
    """It is no reason against a layout."""
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: {tmp_path}}}\ndata: {{train: t, eval: e, token_buckets: [64], tower_buckets: {{}}}}\n"
        "optimizer: {lr: 1e-3}\ntrain: {steps: 9}\neval: {batch_samples: 4}\noutput: {path: o}\n"
    )
    said: list[str] = []
    assert (
        len(list(plan_search.candidates(request.read(str(path), ["data.eval=null", "layout.ep=1"]), 2, said.append)))
        > 1
    )
    notes = [line for line in said if line.startswith("note")]
    assert notes == ["note: eval.batch_samples has no effect without data.eval: it is left out"]


def test_a_layout_that_fails_is_left_out(call: Call) -> None:
    """Of 63 tokens per rank two ranks have 126, which chunks of four do not divide."""
    odd = ["--tokens", "63", *SMALL[2:], "--search", "--world", "2", "layout.remat=full"]
    code, out, err = call("1.7/config.json", *odd)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[1].startswith("left out cp 2, remat full: the batch has 126 tokens but context_parallel('gather')")
    assert [line.split("  layout", 1)[0].split()[0] for line in lines[2:3]] == ["step"]
    assert len(lines) == 1 + 1 + 1 + 4  # whole, dp, ring, ulysses
    code, out, err = call("1.7/config.json", *odd, "layout.cp=2", "layout.kind=gather")
    assert code == 2
    assert "no layout can be planned: the batch has 126 tokens" in err


def test_targets_are_checked_first(call: Call, tmp_path: Path) -> None:
    cases = {
        "1.7/config.json": "is there and was not written by this command",
        "no/plan": "lies in a folder that does not exist",
        "1.7": "is a folder; give the path of a file",
    }
    for target, expected in cases.items():
        for option in ("--json", "--html"):
            found = sentence(call("1.7/config.json", *SMALL, option, target))
            assert f"{option} {target!r} {expected}" in found
    assert "are both 'a'" in sentence(call("1.7/config.json", *SMALL, "--json", "a", "--html", "./a"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.7"]


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "device": (lambda p: p.update(memory_bytes="80 GB"), "memory_bytes is '80 GB' but should be of type int"),
    "layout": (lambda p: p.update(layout={"tp": 2}), "'tp'"),
    "nothing": (lambda p: p.update(tokens=None), "tokens is 'None' but should be of type int"),
    "a number for a list": (lambda p: p.update(leaves=3), "leaves is '3' but should be of type tuple"),
    "a truth for a number": (lambda p: p.update(rank=True), "rank is 'True' but should be of type int"),
    "text inside": (lambda p: p["leaves"][0].update(shape=["a"]), "shape is 'a' but should be of type int"),
    "one missing": (lambda p: p["time"].pop("hfu"), "time lacks 'hfu'"),
    "one too many": (lambda p: p.update(colour=1), "plan has an unknown 'colour'"),
}


def test_damaged_plans_are_one_sentence(call: Call, tmp_path: Path) -> None:
    assert call("1.7/config.json", *SMALL, "--json", "good")[0] == 0
    for change, expected in DAMAGE.values():
        plan = json.loads((tmp_path / "good").read_text())
        change(plan)
        (tmp_path / "bad").write_text(json.dumps(plan))
        found = sentence(call("--diff", "good", "bad"))
        assert "'bad' is no plan" in found
        assert expected in found
    for text in ("[" * 100_000, "[]", "null", '{"leaves": {}}'):
        (tmp_path / "bad").write_text(text)
        assert "'bad' is no plan" in sentence(call("--diff", "bad", "good"))
    assert "'world' has no effect beside it" in sentence(call("--diff", "good", "good", "--world", "2"))
    assert "'config' has no effect beside it" in sentence(call("1.7/config.json", "--diff", "good", "good"))


def test_patterns_are_those_of_the_whole_model(call: Call) -> None:
    """Rules are left out of the step that is traced, which has few layers."""
    decay = "optimizer.weight_decay=0.1"
    known = call("1.7/config.json", *SMALL, "optimizer.no_decay=['text/layers/1/.*']", decay)
    assert known[0] == 0
    for rule in ("optimizer.no_decay=['text/layers/7/.*']", "schedule.groups={'text/layers/7/.*': {lr: 1e-3}}"):
        assert "pattern 'text/layers/7/.*' matches none" in sentence(call("1.7/config.json", *SMALL, rule, decay))


def test_the_batch_that_was_made_is_described(call: Call) -> None:
    """Of 64 tokens in samples of 24 the last has 16; a side of 5 is one of 4, whose 4 features leave room for text."""
    sizes = ["--tokens", "64", "--sample-tokens", "24", "--device", "cpu"]
    image = "tokens with an image of 4 x 4 inputs"
    assert f"2 x 24 {image}, 1 x 16 {image}\n" in call("1.7/config.json", *sizes, "--image-side", "5")[1]
    large = call("1.7/config.json", *sizes, "--image-side", "100")[1]
    assert "2 x 24 tokens of text, 1 x 16 tokens of text, no image of 100 x 100 inputs" in large
    image = "2 x 24 tokens with an image of 8 x 8 inputs, 1 x 16 tokens of text\n"
    assert image in call("1.7/config.json", *sizes, "--image-side", "8")[1]
    assert "image_side is -1 but must be at least 0" in sentence(call("1.7/config.json", *sizes, "--image-side", "-1"))


def test_an_interrupt_of_a_search_is_quiet(tmp_path: Path) -> None:
    """A terminal sends it to every process of the group, those that are still starting included."""
    (tmp_path / "config.json").write_text(json.dumps(hf_config(moe=True, layers=48)))
    arguments = ["plan", "config.json", "--search", "--world", "16", "--all-layers"]
    heed = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # ignored, where tests run as a background job
    command = [sys.executable, "-c", f"import signal; {heed}; from mmfn.cli import main; exit(main({arguments}))"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path, env=env, start_new_session=True
    ) as search:
        assert search.stdout is not None
        assert any(line.startswith("planning ") for line in search.stdout)  # reads until the work begins
        os.killpg(search.pid, signal.SIGINT)
        out, err = search.communicate(timeout=600)
    assert (search.returncode, out, err) == (130, "", "mmfn: error: interrupted\n")


@pytest.mark.parametrize(("compiled", "is_waited_for"), [("none", False), ("layer", True), ("step", True)])
def test_a_graph_that_gathers_is_planned_to_wait(call: Call, compiled: str, *, is_waited_for: bool) -> None:
    """Blocks that keep some results have their gathers in their graphs, where nothing runs beside them."""
    chosen = ["layout.dp=4", "layout.remat=selective", "layout.remat_save=[attention]", f"train.compile={compiled}"]
    code, out, _ = call("1.7/config.json", *SMALL, *chosen)
    rows = [line.split() for line in out.splitlines() if " all_gather " in line or " reduce_scatter " in line]
    moved = [(int(row[4]), int(row[5])) for row in rows if row[1] in ("weights", "gradients")]
    assert code == 0
    assert len(moved) == 3
    assert all(calls == exposed for calls, exposed in moved) == is_waited_for
