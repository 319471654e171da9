"""The Python of the README runs as printed, and what it links to exists."""

import json
import re
from pathlib import Path

import pytest
import torch

import mmfn

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")))


def test_python_blocks_run(full_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    model = mmfn.init(json.loads((full_demo / "model" / "config.json").read_text()))
    mmfn.save_hf("build/demo/run/checkpoint", model, assets=full_demo / "model")
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for block in blocks:
            exec(block, names)
    assert torch.isfinite(names["metrics"]["loss"])
    assert names["logits_TV"].shape == (32, model.cfg.vocab_size)
    assert len(names["tokens"]) == 2
    assert (tmp_path / "build" / "copy" / "tokenizer.json").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("http") or (path.parent / target).exists(), f"{page} links to {target}"
