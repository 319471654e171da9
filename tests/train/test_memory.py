"""Memory policies and dtypes of a run, from its config: the same training, and settings without effect refused."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmfn import cli, tree
from mmfn.train.build.program import build_remat
from mmfn.train.build.run import prepare
from mmfn.train.config.layout import LayoutSection
from mmfn.train.config.load import load_config
from mmfn.train.planning import search as plan_search
from mmfn.train.planning.request import Request, plan_config, read
from mmfn.train.planning.workload import Workload
from mmfn.train.run import loop
from mmfn.train.run.progress import Progress
from mmfn.train.run.training import run_training
from tests.parallel.plan_cases import hf_config

MakeConfig = Callable[..., Path]


def trained(config: Path, *overrides: str) -> tuple[list[dict[str, Any]], Any, tuple[str, ...]]:
    """Records, parameters and what was said before."""
    records: list[dict[str, Any]] = []
    said: list[str] = []
    run = prepare(load_config(config, overrides), say=said.append)
    return records, loop.train(run, records.append)["params"], tuple(said)


@pytest.mark.parametrize(
    "overrides",
    [
        ("layout.remat=uniform", "layout.remat_layers=2", "layout.offload=[activations]"),
        (
            "layout.remat=block",
            "layout.remat_stacks={vision: {kind: full}}",
            "layout.offload=[optimizer]",
            "optimizer.kind=muon",
        ),
        (
            "layout.remat_stacks={vision: {kind: full}}",
            "layout.offload=[activations, optimizer]",
            "optimizer.ema_decay=0.9",
            "output.weights=ema",
        ),
        ("layout.offload=[parameters]", "layout.remat=full", "optimizer.kind=muon", "data.token_buckets=[128]"),
        (
            "layout.offload=[activations, optimizer, parameters]",
            "layout.prefetch=false",
            "lora.rank=2",
            "lora.keep=['text/norm/.*']",
            "optimizer.ema_decay=0.9",
            "output.weights=ema",
        ),
    ],
)
def test_policies_change_no_bit(overrides: Sequence[str], make_config: MakeConfig) -> None:
    config = make_config({"train.steps": 2, "data.check": "first"})
    plain = [text for text in overrides if not text.startswith("layout.")]
    records, params, _ = trained(config, *plain)
    other_records, other, said = trained(config, *overrides)
    assert [r["loss"] for r in records] == [r["loss"] for r in other_records]
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(params), tree.leaves(other), strict=True))
    assert any(note.startswith(("remat", "offload")) for note in said)


def test_a_whole_run_with_parameters_on_the_host(make_config: MakeConfig, tmp_path: Path) -> None:
    """Averages, adapters, checkpoint and answers at the end, bit by bit."""
    chosen = ("lora.rank=2", "optimizer.ema_decay=0.9", "output.weights=ema", "eval.batch_samples=12")
    found = []
    for name, what in (("plain", "[]"), ("hosted", "[parameters, optimizer]")):
        config = make_config({"train.steps": 2, "data.check": "first", "output.path": str(tmp_path / name)})
        run = prepare(load_config(config, [*chosen, f"layout.offload={what}"]), say=lambda text: None)
        assert all(x is y for x, y in zip(tree.leaves(run.state["params"]), tree.leaves(run.model.params), strict=True))
        result = run_training(run, Progress(num_steps=2, log_every=2, stream=io.StringIO()))
        files = sorted(path.relative_to(result.folder) for path in result.folder.rglob("*.safetensors"))
        weights = [load_file(result.folder / path) for path in files]
        found.append((files, weights, tree.leaves(result.model.params), result.evaluation.loss_sum))
    assert [str(path.parent) for path in found[0][0]] == ["adapter", "checkpoint"]
    assert found[0][0] == found[1][0]
    assert found[0][3] == found[1][3]
    for want, got in zip(*(tree.leaves(values[1:3]) for values in found), strict=True):
        assert torch.equal(want, got)


def test_a_plan_and_a_search_of_what_lies_on_the_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    path = str(tmp_path / "config.json")
    small = ["--tokens", "64", "--sample-tokens", "32", "--image-side", "4", "--device", "cpu"]
    chosen = ["layout.offload=[parameters, optimizer]", "layout.prefetch=false"]
    assert cli.main(["plan", path, *chosen, *small]) == 0
    printed = capsys.readouterr().out
    assert "offload: parameters to the host" in printed
    assert "held on the host" in printed
    workload = Workload(tokens=64, sample_tokens=32, image_side=4)
    found = list(plan_search.candidates(read(path, chosen[:1]), 2))
    assert len({config.layout.kind for config in found if config.layout.cp == 2}) == 3
    for config in found:
        request = Request(config=config, device="cpu", workload=workload, title="")
        planned = plan_config(request)
        assert planned.host_bytes == planned.total("parameter") + planned.total("optimizer")


def test_bfloat16_with_and_without_rules(make_config: MakeConfig) -> None:
    """Weights of norms are ones at first, so the rules tell from the second step on."""
    config = make_config({"train.steps": 3, "data.check": "first"})
    want = trained(config)[0]
    last = []
    for rules in ("null", "{}", "{'.*norm/weight': float32}"):
        records, _, said = trained(config, "layout.compute_dtype=bfloat16", f"layout.compute_rules={rules}")
        assert all(0 < abs(r["loss"] - w["loss"]) < 0.05 for r, w in zip(records, want, strict=True))
        assert any("compute torch.bfloat16" in note for note in said)
        last.append(records[-1]["loss"])
    assert len(set(last)) == 3


def test_policies_of_stacks() -> None:
    stacks = ("text", "vision")
    assert len(build_remat(LayoutSection(remat="full"), stacks)) == 1
    tower = {"vision": {"kind": "none"}}
    assert len(build_remat(LayoutSection.model_validate({"remat": "full", "remat_stacks": tower}), stacks)) == 2
