"""Training on a mesh from a config: the numbers and files of one device, and how a run of several ranks ends."""

import ctypes.util
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mmfn
from mmfn import batch as packing
from mmfn import tree
from mmfn.interop.checkpoint import read_config
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import run_virtual, virtual
from mmfn.parallel.weights.sharding import shard_params, whole_params
from mmfn.train.build.data import build_loader, load_model_processor, open_dataset
from mmfn.train.build.model import load_model
from mmfn.train.build.program import build_program
from mmfn.train.build.run import Run, prepare
from mmfn.train.build.step import build_step
from mmfn.train.config.load import Loaded, load_config
from mmfn.train.data import agree
from mmfn.train.run import loop
from mmfn.train.run.evaluate import evaluate
from mmfn.train.run.progress import Progress
from mmfn.train.run.result import Result
from mmfn.train.run.training import run_training

ROOT = Path(__file__).parents[2]
MakeConfig = Callable[..., Path]
CPU = torch.device("cpu")
# several micro-batches, unevenly many per rank
SMALL = ("data.token_buckets=[64, 128]", "data.tower_buckets={vision: [64]}")
LAYOUTS = {
    "dp": ("layout.dp=2",),
    "dp-uneven": ("layout.dp=3", *SMALL),
    "hsdp": ("layout.replicate=2", "layout.dp=2", *SMALL),
    "ring": ("layout.cp=2", "layout.kind=ring", *SMALL),
    "ulysses": ("layout.cp=2", "layout.kind=ulysses", "layout.remat=full"),
    "dp-gather": ("layout.dp=2", "layout.cp=2", *SMALL),
}
NUMBERS = ("loss", "grad_norm", "samples", "tokens", "supervised", "media_tokens")


def on_ranks(loaded: Loaded, work: Callable[[Run], Any]) -> list[Any]:
    """`work(run)` on all ranks of a config's layout, in one process."""

    def rank(mesh: Mesh) -> Any:
        place = Place(device=CPU, mesh=mesh, host=mesh)
        return work(prepare(loaded, lambda text: None, place))

    return virtual(loaded.config.layout.sizes, rank)


def train(run: Run) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    loop.train(run, records.append)
    return records


@pytest.mark.parametrize("name", ["dp", "hsdp", "dp-gather"])
def test_training_on_a_mesh_is_training_on_one_device(make_config: MakeConfig, name: str) -> None:
    path = make_config({"train.steps": 3, "data.check": "first", "data.eval": None})
    expected = train(prepare(load_config(path), lambda text: None))
    ranks = on_ranks(load_config(path, LAYOUTS[name]), train)
    for records in ranks:
        for own, first, one in zip(records, ranks[0], expected, strict=True):
            assert {k: own[k] for k in NUMBERS} == {k: first[k] for k in NUMBERS}
            assert own["loss"] == pytest.approx(one["loss"], rel=2e-3)  # adamw turns rounding into steps of size lr
            assert [own[k] for k in NUMBERS[2:]] == [one[k] for k in NUMBERS[2:]]
        assert records[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
        assert records[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_through_the_loader_in_float64(make_config: MakeConfig, name: str) -> None:
    """One optimizer step per global batch: loss, gradient norm and parameters equal one device's to rounding."""
    path = make_config()

    def run(mesh: Mesh, loaded: Loaded) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
        config = loaded.config
        model = load_model(config.model, seed=0)
        specs = model.family.specs(model.cfg)
        params = tree.map(torch.Tensor.double, model.params)
        model = replace(model, params=params if mesh.layout.world == 1 else shard_params(params, specs, mesh))
        program = build_program(config, model.family, model.cfg, mesh)
        processor = load_model_processor(config.model.path)
        loader = build_loader(config, open_dataset(config, config.data.train, processor), model, program)
        step, state = build_step(config, model, program)
        empty, found = loader.empty(), []
        for number in range(2):
            share = agree(loader.share(number), mesh["batch"], empty)
            state, metrics = step(state, [wide(b) for b in share.microbatches])
            found.append({key: float(value) for key, value in metrics.items()})
        return found, [leaf.clone() for leaf in tree.leaves(whole_params(state["params"], mesh))]

    def wide(batch: packing.Batch) -> packing.Batch:
        return replace(packing.to(batch, CPU, torch.float64), weights_T=batch.weights_T.double())

    expected, leaves = run(single_mesh(), load_config(path, ["data.token_buckets=[512]"]))
    loaded = load_config(path, LAYOUTS[name])
    world = run_virtual(loaded.config.layout.sizes, lambda mesh: run(mesh, loaded))
    kinds = [[(c.axis, c.name, c.site) for c in calls] for calls in world.calls]
    assert all(calls == kinds[0] for calls in kinds)
    for metrics, own in world.results:
        for one, other in zip(expected, metrics, strict=True):
            assert other == pytest.approx(one, rel=1e-10)
        for a, b in zip(leaves, own, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


def test_ranks_divide_the_samples_of_every_step(make_config: MakeConfig) -> None:
    path = make_config({"data.batch_samples": 7, "data.check": "first"})
    one = prepare(load_config(path), lambda text: None).loader
    ranks = on_ranks(load_config(path, ("layout.dp=3",)), lambda run: [run.loader.own(step) for step in range(20)])
    for step in range(20):
        parts = [rank[step] for rank in ranks]
        assert sorted(index for part in parts for index in part) == sorted(one.indices(step))
        assert [len(part) for part in parts] == [3, 2, 2]


def test_ranks_agree_on_the_number_of_microbatches(make_config: MakeConfig) -> None:
    loaded = load_config(make_config({"data.batch_samples": 7, "data.check": "first"}), ("layout.dp=3", *SMALL))

    def work(run: Run) -> Any:
        own, empty = run.loader.share(0), run.loader.empty()
        return own, agree(own, run.place.host["batch"], empty), empty

    ranks = on_ranks(loaded, work)
    numbers = [len(own.microbatches) for own, _, _ in ranks]
    assert len(set(numbers)) > 1
    padded = sum(own.counts.padded_tokens for own, _, _ in ranks)
    missing = sum(max(numbers) - number for number in numbers)
    for own, agreed, empty in ranks:
        assert len(agreed.microbatches) == max(numbers)
        assert agreed.microbatches[: len(own.microbatches)] == own.microbatches
        assert all(b is empty.microbatches[0] for b in agreed.microbatches[len(own.microbatches) :])
        assert agreed.counts == ranks[0][1].counts
        assert agreed.counts.samples == 7
        assert agreed.counts.padded_tokens == padded + missing * 64
    assert empty.counts.tokens == empty.counts.samples == empty.counts.supervised_tokens == 0


def test_evaluation_is_divided_and_complete_everywhere(make_config: MakeConfig) -> None:
    run = prepare(load_config(make_config()), lambda text: None)
    settings: Any = {"max_new_tokens": 3, "eos_token_ids": run.eos_token_ids}
    alone = evaluate(run.model, run.held_out, batch_samples=24, **settings)
    done: list[int] = []

    def work(mesh: Mesh) -> Any:
        return evaluate(run.model, run.held_out, batch_samples=4, axis=mesh["world"], on_batch=done.append, **settings)

    for found in virtual(Layout(dp=5), work):  # 24 entries: ranks have 5 or 4
        assert found.answers == alone.answers
        assert found.num_tokens == alone.num_tokens
        assert found.loss_sum == pytest.approx(alone.loss_sum, rel=1e-5)
    assert sorted(done) == [4] * 5 + [5] * 4


def test_the_first_rank_writes_what_one_device_writes(make_config: MakeConfig, tmp_path: Path) -> None:
    path = make_config({"train.steps": 2, "data.check": "first"})
    streams = []

    def work(run: Run) -> Result:
        streams.append(stream := io.StringIO())
        return run_training(run, Progress(num_steps=2, log_every=1, stream=stream))

    run_training(
        prepare(load_config(path), lambda text: None), Progress(num_steps=2, log_every=1, stream=io.StringIO())
    )
    results = on_ranks(load_config(path, ("layout.dp=2", f"output.path={tmp_path / 'ranks'}")), work)
    assert sorted(bool(stream.getvalue()) for stream in streams) == [False, True]
    one, several = tmp_path / "run", tmp_path / "ranks"
    assert sorted(p.name for p in several.iterdir()) == sorted(p.name for p in one.iterdir())
    lines = (several / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    names = [sorted(p.name for p in (folder / "checkpoint").iterdir()) for folder in (one, several)]
    assert names[0] == names[1]
    assert all(type(leaf) is torch.Tensor for leaf in tree.leaves(results[0].model.params))
    assert any(type(leaf) is not torch.Tensor for leaf in tree.leaves(results[1].model.params))
    assert results[1].evaluation.answers == results[0].evaluation.answers


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["layout.dp=3", "data.batch_samples=2"], "batch_samples must be at least 3, one for each rank"),
        (["layout.cp=2", "data.token_buckets=[386]"], "token_buckets has 386 .* needs multiples of 4; use 388"),
        (["layout.cp=3", "layout.kind=ulysses", "data.token_buckets=[384]"], "4 query heads, which ulysses 3 does not"),
        (["layout.dp=2", "layout.ep=2"], "expert"),
    ],
)
def test_layouts_the_run_cannot_take_are_refused(make_config: MakeConfig, overrides: list[str], expected: str) -> None:
    path = make_config()
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(ValueError, match=expected):
        on_ranks(load_config(path, overrides), lambda run: None)
    assert sorted(path.parent.rglob("*")) == before


def start(num: int, *args: str) -> list[subprocess.Popen[str]]:
    """`num` ranks of a command, with the environment that torchrun sets, so that every exit code is seen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start_rank(rank, num, port, *args) for rank in range(num)]


def start_rank(rank: int, num: int, port: int, *args: str) -> subprocess.Popen[str]:
    """One of `num` ranks, which meet at a port of this machine."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-m", "mmfn", *args],
        cwd=ROOT,
        env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(ranks: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of every rank."""
    try:
        outputs = [rank.communicate(timeout=180) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]


@pytest.mark.dist
def test_torchrun_trains_and_evaluates(make_config: MakeConfig, tmp_path: Path) -> None:
    path = make_config()
    expected = train(prepare(load_config(path), lambda text: None))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mmfn"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command, "train", str(path), "layout.dp=2"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("step=")] == ["step=2/4", "step=4/4"]
    assert lines[0] == "data_parallel: parameters over 2 ranks, next gather ahead (eager)"
    assert sum(line.startswith("held-out accuracy") for line in lines) == 1
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in expected], rel=2e-3)
    stored = json.loads((tmp_path / "run" / "eval.json").read_text())
    again = finish(
        start(2, "eval", str(path), f"model.path={tmp_path / 'run' / 'checkpoint'}", "model.init=load",
              "--out", str(tmp_path / "again.json"))
    )  # fmt: skip
    assert [(code, errors) for code, _, errors in again] == [(0, ""), (0, "")]
    assert [output.count("held-out accuracy") for _, output, _ in again] == [1, 0]
    assert json.loads((tmp_path / "again.json").read_text())["answers"] == stored["answers"]


@pytest.mark.dist
def test_a_wrong_layout_is_one_sentence_and_exit_code_2_on_all_ranks(make_config: MakeConfig, tmp_path: Path) -> None:
    ranks = finish(start(2, "train", str(make_config()), "layout.dp=3"))
    assert [code for code, _, _ in ranks] == [2, 2]
    assert "".join(errors for _, _, errors in ranks) == (
        "mmfn: error: layout dp 3: replicate * dp * cp = 3 but there are 2 ranks; change the layout, or start 3 ranks\n"
    )
    assert not (tmp_path / "run").exists()


def two_ranks(*settings: Sequence[str], command: str = "train") -> list[tuple[int, str, str]]:
    """Two agents of one rank each, which were started with different arguments."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return finish([start_rank(rank, 2, port, command, *own) for rank, own in enumerate(settings)])


@pytest.mark.dist
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("optimizer.lr=3e-3", "rank 1 has optimizer.lr 0.003 but rank 0 has 0.002; start all ranks with the same"),
        ("train.seed=1", "rank 1 has train.seed 1 but rank 0 has 0; start all ranks with the same"),
        ("data.train=", "rank 1 has data.train with the content '"),
        ("model.path=", "rank 1 has weights (model.path, model.adapter) with the content '"),
    ],
    ids=["settings", "order", "data", "weights"],
)
def test_ranks_that_differ_are_refused(
    make_config: MakeConfig, small_demo: Path, tmp_path: Path, changed: str, expected: str
) -> None:
    """Everything that decides a number is the same on all ranks, or nothing is trained."""
    path = make_config({"data.eval": None, "data.check": "first"})
    common = [str(path), "layout.dp=2"]
    if changed == "data.train=":
        entries = json.loads((small_demo / "train.json").read_text())
        (tmp_path / "train.json").write_text(json.dumps(entries[1:] + entries[:1]))
        changed += str(tmp_path / "train.json")
    if changed == "model.path=":
        base = mmfn.init(read_config(small_demo / "model"), seed=0)
        for name, model in (("a", base), ("b", replace(base, params=tree.map(lambda x: 1.01 * x, base.params)))):
            mmfn.save_hf(tmp_path / name, model, assets=small_demo / "model")
        common += ["model.init=load", f"model.path={tmp_path / 'a'}"]
        changed += str(tmp_path / "b")
    ranks = two_ranks(common, [*common, changed])
    assert [code for code, _, _ in ranks] == [2, 2]
    said = "".join(errors for _, _, errors in ranks)
    assert said.count("\n") == 1
    assert said.startswith("mmfn: error: " + expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.dist
def test_ranks_may_differ_in_paths_and_workers(make_config: MakeConfig, small_demo: Path, tmp_path: Path) -> None:
    path = make_config({"data.eval": None, "data.check": "first", "train.steps": 1})
    copy = tmp_path / "copy.json"
    copy.write_bytes((small_demo / "train.json").read_bytes())
    common = [str(path), "layout.dp=2"]
    own = [*common, f"data.train={copy}", "data.workers=0", "train.log_every=7", f"output.path={tmp_path / 'other'}"]
    assert [(code, errors) for code, _, errors in two_ranks(common, own)] == [(0, ""), (0, "")]
    assert (tmp_path / "run" / "checkpoint").is_dir()
    assert not (tmp_path / "other").exists()


@pytest.mark.dist
def test_an_error_of_one_rank_ends_all(make_config: MakeConfig, tmp_path: Path) -> None:
    """Only one of the two ranks prepares the broken sample; the other waits for it before it makes the run folder."""
    path = make_config({"data.eval": None})
    entries = json.loads(Path(load_config(path).config.data.train).read_text())
    (tmp_path / "broken.png").write_bytes(b"no image")
    entries[-1]["images"] = ["broken.png"]
    for entry in entries[:-1]:
        entry["images"] = []
        entry["messages"][0]["content"] = "Which digit is this?"
    (tmp_path / "train.json").write_text(json.dumps(entries))
    changes = ["layout.dp=2", f"data.train={tmp_path / 'train.json'}", f"data.root={tmp_path}"]
    ranks = finish(start(2, "train", str(path), *changes))
    assert [code for code, _, _ in ranks] == [2, 2], ranks
    assert [bool(errors) for _, _, errors in ranks].count(True) == 1
    assert "broken.png" in "".join(errors for _, _, errors in ranks)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def heap_checker(monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc checks the heap of new processes at every call, and fills what is freed: whoever uses that reads junk."""
    monkeypatch.setenv("MALLOC_CHECK_", "3")
    monkeypatch.setenv("MALLOC_PERTURB_", "165")
    if library := ctypes.util.find_library("c_malloc_debug"):  # where the checks are since glibc 2.34
        monkeypatch.setenv("LD_PRELOAD", library)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.usefixtures("heap_checker")
@pytest.mark.parametrize("layout", [("layout.dp=4",), ("layout.dp=2", "layout.cp=2", "layout.kind=ring")])
def test_runs_of_four_ranks_under_a_heap_checker(make_config: MakeConfig, layout: tuple[str, ...]) -> None:
    """A run of this size once ended with "double free or corruption" on one rank."""
    path = make_config({"train.steps": 60, "train.log_every": 60, "data.check": "first"})
    for code, _, errors in finish(start(4, "train", str(path), *layout, *SMALL)):
        assert (code, errors) == (0, "")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.usefixtures("heap_checker")
@pytest.mark.parametrize("time", range(4))
def test_errors_of_one_rank_under_a_heap_checker(make_config: MakeConfig, tmp_path: Path, time: int) -> None:
    """Without `Ranks.leave` about one in four ended with SIGABRT: a thread of gloo met a Python that was gone."""
    test_an_error_of_one_rank_ends_all(make_config, tmp_path)


@pytest.mark.dist
def test_a_killed_rank_ends_the_others(make_config: MakeConfig) -> None:
    ranks = start(2, "train", str(make_config({"train.steps": 10_000, "train.log_every": 1})), "layout.dp=2")
    for line in ranks[0].stdout:
        if line.startswith("step=2/"):
            break
    ranks[1].kill()
    (code, _, errors), _ = finish(ranks)
    assert code == 2
    assert errors.startswith("mmfn: error: another rank ended or does not answer (")
    assert errors.count("\n") == 1
