"""The settings of sections `objective` and `layout.head` in runs from a config."""

import io
import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfn import cli
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.train.build.run import prepare
from mmfn.train.config.load import load_config
from mmfn.train.run import loop
from mmfn.train.run.progress import Progress
from mmfn.train.run.training import run_training

MakeConfig = Callable[..., Path]
SPECIAL = ("objective.name=square_loss", "objective.z_loss=1e-3", "objective.label_smoothing=0.1")
SMALL = ("data.token_buckets=[64, 128]", "data.tower_buckets={vision: [64]}", "train.steps=2")  # several micro-batches


def records(config: Path, *overrides: str) -> list[dict[str, Any]]:
    """Those of the first rank, all ranks in one process."""
    loaded = load_config(config, overrides)

    def rank(mesh: Mesh) -> list[dict[str, Any]]:
        run = prepare(loaded, lambda text: None, Place(device=torch.device("cpu"), mesh=mesh, host=mesh))
        found: list[dict[str, Any]] = []
        loop.train(run, found.append)
        return found

    return virtual(loaded.config.layout.sizes, rank)[0]


def losses(found: list[dict[str, Any]]) -> list[float]:
    return [r[name] for r in found for name in ("loss", "ce", "grad_norm")]


def test_the_logged_loss_is_what_is_minimised_and_ce_stands_beside_it(make_config: MakeConfig) -> None:
    found = records(make_config(), *SPECIAL, "train.steps=2")
    assert all(r["loss"] > r["ce"] > 0 for r in found)
    plain = records(make_config(), "objective.name=square_loss", "train.steps=2")
    assert all("ce" not in r for r in plain)
    assert plain[0]["loss"] == pytest.approx(found[0]["ce"], rel=1e-6)


def test_chunks_and_a_sharded_head_change_nothing(make_config: MakeConfig) -> None:
    config = make_config()
    expected = records(config, *SPECIAL, *SMALL, "layout.dp=2")
    for settings in (
        ("objective.chunk_size=5",),
        ("objective.total_chunk_size=5",),
        ("layout.head=sharded",),
        ("layout.head=sharded", "objective.chunk_size=5"),
    ):
        found = records(config, *SPECIAL, *SMALL, "layout.dp=2", *settings)
        assert losses(found) == pytest.approx(losses(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("layout.dp=2", "layout.head=sharded", "train.compile=step"), "a step with a sharded head is no single graph"),
        (("objective.label_smoothing=1.5",), "objective.label_smoothing is 1.5"),
        (("objective.z_loss=-1",), "objective.z_loss is -1"),
        (("objective.chunk_size=0",), "objective.chunk_size is 0"),
        (
            ("objective.chunk_size=8", "objective.total_chunk_size=8"),
            "chunk_size and objective.total_chunk_size are both set",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    make_config: MakeConfig, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(make_config(), overrides)


@pytest.fixture(scope="module")
def experts_model(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder with a config of experts."""
    folder = tmp_path_factory.mktemp("experts")
    for path in (small_demo / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    hf = json.loads((folder / "config.json").read_text())
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.25}
    text = {**hf["text_config"], **experts, "output_router_logits": True}
    hf |= {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(hf))
    return folder


@pytest.mark.parametrize(("weight", "expected"), [(None, 0.25), (2.0, 2.0), (0.0, 0.0)])
def test_the_weight_of_the_router_balance(
    make_config: MakeConfig, experts_model: Path, weight: float | None, expected: float
) -> None:
    """The loss is the cross entropy and so many times the balancing loss, and the log says the weight."""
    said: list[str] = []
    settings = {"model.path": str(experts_model), "train.steps": 1, "data.check": "first", "data.eval": None}
    chosen = {} if weight is None else {"objective.router_aux_coef": weight}
    run = prepare(load_config(make_config({**settings, **chosen})), said.append)
    found: list[dict[str, Any]] = []
    loop.train(run, found.append)
    (record,) = found
    if expected:
        assert record["aux_loss"] > 1
        assert record["loss"] == pytest.approx(record["ce"] + expected * record["aux_loss"], rel=1e-6)
    else:
        assert not {"ce", "aux_loss"} & record.keys()
    source = "config.json" if weight is None else "objective.router_aux_coef"
    assert record["dropped"] == 0, "what a model counts is recorded too"
    assert run.loss_terms == (("ce", "aux_loss") if expected else ())
    assert f"aux_loss: weight {expected:g}, of {source}" in said


def test_the_terms_of_a_loss_are_shown_and_reported(make_config: MakeConfig, experts_model: Path) -> None:
    settings = {"model.path": str(experts_model), "train.steps": 2, "data.check": "first", "data.eval": None}
    run, stream = prepare(load_config(make_config(settings)), lambda text: None), io.StringIO()
    result = run_training(run, Progress(num_steps=2, log_every=1, stream=stream))
    last = result.tally.last[-1]
    assert f" loss={last['loss']:.4f} ce={last['ce']:.4f} aux_loss={last['aux_loss']:.4f} grad" in stream.getvalue()
    page = (result.folder / "report.html").read_text()
    for name in ("ce", "aux_loss"):
        assert f"training loss: {name}" in page
        assert f"{sum(r[name] for r in result.tally.last) / 2:.4f}" in page


def test_a_model_without_experts_has_no_router_balance(make_config: MakeConfig) -> None:
    said: list[str] = []
    prepare(load_config(make_config({"data.check": "first"})), said.append)
    assert not any("weight" in line for line in said)
    with pytest.raises(ValueError, match=r"objective.router_aux_coef has no effect, the model has no experts; remove"):
        prepare(load_config(make_config({"objective.router_aux_coef": 0.1})), said.append)


def test_the_reference_table_trains_and_evaluates_the_same(make_config: MakeConfig) -> None:
    """`model.kernels` chooses the table of training, of evaluation and of a plan."""
    settings = {"train.steps": 2, "data.check": "first"}
    found = {}
    for name in ("portable", "reference"):
        run = prepare(load_config(make_config(settings), [f"model.kernels={name}"]), lambda text: None)
        records: list[dict[str, Any]] = []
        loop.train(run, records.append)
        found[name] = [record[key] for record in records for key in ("loss", "grad_norm")]
    assert found["reference"] == pytest.approx(found["portable"], rel=1e-5)
    assert found["reference"] != found["portable"]


WITHOUT_TORCH_NPU = pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed")


@pytest.mark.parametrize("name", ["cuda", pytest.param("npu", marks=WITHOUT_TORCH_NPU)])
def test_a_table_that_there_is_not_here_is_refused_by_every_command(
    make_config: MakeConfig, small_demo: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, choice = str(make_config()), f"model.kernels={name}"
    commands = (
        ["train", config, choice],
        ["eval", config, choice],
        ["generate", str(small_demo / "model"), "hello", "--kernels", name],
    )
    for command in commands:
        assert cli.main(command) == 2
        assert re.search(
            f"NPUs need torch_npu, which is not installed; .* or use model.kernels=portable|model.kernels '{name}' are "
            "those of a device that model.device 'cpu' is not; use model.kernels=portable",
            capsys.readouterr().err,
        )
