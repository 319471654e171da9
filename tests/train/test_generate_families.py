"""`mmfn generate` on two real ranks that share the experts: images and sound, attention and recurrent layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmfn import cli
from tests.train.test_processes import finish, start

ROOT = Path(__file__).parents[2]


@pytest.mark.dist
@pytest.mark.parametrize("family", ["qwen3_omni", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)])
def test_ranks_that_share_experts_answer_as_one(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five questions: at the end one of the two ranks has none, and goes along."""
    subprocess.run([sys.executable, str(ROOT / "examples" / "every_family.py"), str(tmp_path), family], check=True)
    entries = json.loads((tmp_path / "eval.json").read_text())
    (tmp_path / "five.json").write_text(json.dumps(entries[:5]))
    settings = ["--prompts", str(tmp_path / "five.json"), "--max-new-tokens", "10", "--temperature", "0.7"]
    assert cli.main(["generate", str(tmp_path / "model"), *settings]) == 0
    expected = capsys.readouterr().out
    layout = [part for size in ("dp=2", "ep=2") for part in ("--set", f"layout.{size}")]
    ranks = finish(start(2, "generate", str(tmp_path / "model"), *settings, *layout, "--set", "eval.batch_samples=1"))
    assert [(code, errors) for code, _, errors in ranks] == [(0, "")] * 2
    assert [output for _, output, _ in ranks] == [expected, ""]
    assert len({json.loads(line)["answer"] for line in expected.splitlines()}) > 1
