"""A run from config to folder: the loop against a hand-written one, what it records, what it leaves behind."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmfn
from mmfn import tree
from mmfn.batch import in_floats
from mmfn.train.build.model import find_device
from mmfn.train.build.run import Run, prepare
from mmfn.train.config.load import load_config
from mmfn.train.data import Workers, prefetch
from mmfn.train.objective import per_token_loss, weigh
from mmfn.train.run import folder as run_folder
from mmfn.train.run import loop
from mmfn.train.run.folder import write_text
from mmfn.train.run.progress import Progress
from mmfn.train.run.record import Meter
from mmfn.train.run.result import Result
from mmfn.train.run.training import run_training

MakeConfig = Callable[..., Path]


def prepared(config: Path, overrides: tuple[str, ...] = ()) -> Run:
    return prepare(load_config(config, overrides), say=lambda text: None)


def trained(config: Path, *overrides: str) -> tuple[list[dict[str, Any]], Any]:
    records: list[dict[str, Any]] = []
    state = loop.train(prepared(config, overrides), records.append)
    return records, state["params"]


def quiet(run: Run) -> Result:
    steps = run.loaded.config.train.steps
    return run_training(run, Progress(num_steps=steps, log_every=steps, stream=io.StringIO()))


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def test_prepare_writes_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    config = make_config()
    prepared(config)
    assert sorted(tmp_path.rglob("*")) == [*before, config]


def test_loop_equals_a_hand_written_one(make_config: MakeConfig) -> None:
    config = make_config()
    records, params = trained(config)
    run = prepared(config)
    state, losses = run.state, []
    for step in range(4):
        state, metrics = run.step(state, [in_floats(batch) for batch in run.loader.microbatches(step)])
        losses.append(metrics["loss"].item())
    assert [r["loss"] for r in records] == losses
    assert equal(params, state["params"])
    assert int(state["step"]) == 4


def test_first_loss_is_that_of_the_initial_model(make_config: MakeConfig) -> None:
    config = make_config({"data.token_buckets": [512]})
    records, _ = trained(config)
    run = prepared(config)
    (batch,) = run.loader.microbatches(0)
    logits_TV = mmfn.logits(run.model, in_floats(batch))
    labels_T = batch.labels_T[: logits_TV.shape[0]]
    expected = torch.nn.functional.cross_entropy(logits_TV, labels_T)
    assert records[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert records[0]["supervised"] == int((labels_T != -100).sum())
    assert records[0]["tokens"] == labels_T.numel()
    assert records[0]["padding"] == pytest.approx(1 - labels_T.numel() / 512, abs=1e-4)
    assert records[0]["media_tokens"] == 8 * 4  # 16 x 16 pixels, patches of 4, merged 2 x 2


@pytest.mark.parametrize("workers", [0, 3])
def test_result_does_not_depend_on_workers(make_config: MakeConfig, workers: int) -> None:
    config = make_config()
    records, params = trained(config)
    ahead = ["data.ahead=1"] if workers else []
    others, again = trained(config, f"data.workers={workers}", *ahead, "data.cache_mib=0", "data.check=first")
    assert [r["loss"] for r in others] == [r["loss"] for r in records]
    assert equal(params, again)


def test_smaller_buckets_give_the_same_training(make_config: MakeConfig) -> None:
    config = make_config()
    records, _ = trained(config)
    others, _ = trained(config, "data.token_buckets=[64]", "data.tower_buckets={vision: [64]}")
    assert others[0]["microbatches"] > records[0]["microbatches"] == 1
    assert [r["loss"] for r in others] == pytest.approx([r["loss"] for r in records], rel=2e-3)
    assert others[0]["loss"] == pytest.approx(records[0]["loss"], rel=1e-5)


def test_seed_decides_weights_and_order(make_config: MakeConfig) -> None:
    config = make_config()
    a, b = prepared(config), prepared(config, ("train.seed=1",))
    assert not equal(a.model.params, b.model.params)
    assert a.loader.indices(0) != b.loader.indices(0)


def test_records_are_complete_and_in_order(make_config: MakeConfig) -> None:
    records, _ = trained(make_config({"schedule.warmup_steps": 2}))
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert [r["lr"] for r in records] == pytest.approx([0.0, 1e-3, 2e-3, 1e-3])
    for record in records:
        assert all(math.isfinite(value) for value in record.values())
    assert records[-1]["eta_s"] == 0


class Reads(TorchDispatchMode):
    """Counts the numbers that are read one by one."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_every_metric_is_recorded_by_one_copy() -> None:
    metrics = {
        "loss": torch.tensor(1.1), "ce_ahead_1": torch.tensor(2.5, dtype=torch.float64), "aux_loss": torch.tensor(0.3),
        "dropped": torch.tensor(2**40 + 1), "grad_norm": torch.tensor(math.nan), "skipped": torch.tensor(1),
        "tokens": torch.tensor(7), "histogram": torch.ones(3),
    }  # fmt: skip
    with Reads() as reads:
        record = (meter := Meter(2)).finish({"step": 1, "tokens": 9, "flops": 0}, metrics, meter.lap())
    assert reads.count == 0
    numbers = {name: x.item() for name, x in metrics.items() if name not in ("histogram", "tokens", "grad_norm")}
    assert {name: record[name] for name in numbers} == numbers
    assert type(record["dropped"]) is type(record["skipped"]) is int
    assert math.isnan(record["grad_norm"])
    assert record["tokens"] == 9
    assert "histogram" not in record
    with pytest.raises(ValueError, match="a loss or a stat 'eta_s', which a record needs; give it another name"):
        meter.finish({"step": 1, "tokens": 9, "flops": 0}, {**metrics, "eta_s": torch.tensor(0.0)}, meter.lap())


def test_clipping_and_decay_reach_the_optimizer(make_config: MakeConfig) -> None:
    config = make_config({"train.steps": 2})
    _, plain = trained(config, "optimizer.clip_norm=null")
    _, clipped = trained(config, "optimizer.clip_norm=1e-3")
    _, decayed = trained(config, "optimizer.clip_norm=null", "optimizer.weight_decay=0.5")
    _, spared = trained(config, "optimizer.clip_norm=null", "optimizer.weight_decay=0.5", "optimizer.no_decay=['.*']")
    assert not equal(plain, clipped)
    assert not equal(plain, decayed)
    assert equal(plain, spared)


def test_run_folder_holds_everything(make_config: MakeConfig, tmp_path: Path) -> None:
    run = prepared(make_config())
    result = quiet(run)
    folder = tmp_path / "run"
    absent = {
        "adapter",
        "skipped.jsonl",
        "answers.jsonl",
        "state",
        "stacks",
        "profile",
        "exports",
        "earlier",
        *run_folder.TRACKERS,
    }
    assert {p.name for p in folder.iterdir()} == set(run_folder.RUN_FILES) - absent
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(result.tally.last)
    assert load_config(folder / "config.yaml").config == run.loaded.config
    stored = mmfn.load_hf(folder / "checkpoint")
    assert equal(stored.params, result.model.params)
    evaluation = json.loads((folder / "eval.json").read_text())
    assert evaluation["num_answers"] == len(evaluation["answers"]) == 24
    page = (folder / "report.html").read_text()
    assert page.count('class="sample ') == 24
    assert page.count("<svg") == page.count('role="img"') >= 8


def test_run_without_held_out_data(make_config: MakeConfig, tmp_path: Path) -> None:
    result = quiet(prepared(make_config({"data.eval": None, "train.steps": 1})))
    assert result.evaluation is None
    assert not (tmp_path / "run" / "eval.json").exists()
    assert "held-out accuracy" not in (tmp_path / "run" / "report.html").read_text()


def test_occupied_folder_is_refused_or_replaced(make_config: MakeConfig, tmp_path: Path) -> None:
    changes = {"train.steps": 1, "data.eval": None}
    folder = tmp_path / "run"
    folder.mkdir()
    quiet(prepared(make_config(changes)))  # an empty folder is taken
    with pytest.raises(
        ValueError, match=r"is not empty: the run in it is finished; choose another or set output.overwrite=true"
    ):
        prepared(make_config(changes))
    (folder / "eval.json").write_text("stale")
    quiet(prepared(make_config({**changes, "output.overwrite": True})))
    assert not (folder / "eval.json").exists()
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds 'thesis.txt', which no run wrote"):
        prepared(make_config({**changes, "output.overwrite": True}))
    assert (folder / "thesis.txt").read_text() == "precious"


def test_a_failing_run_keeps_the_one_it_overwrites(make_config: MakeConfig, tmp_path: Path) -> None:
    changes = {"train.steps": 1, "data.eval": None, "output.overwrite": True}
    folder = tmp_path / "run"
    quiet(prepared(make_config(changes)))
    for _ in range(2):  # the second one must not take the failed first one for the earlier run
        with pytest.raises(ValueError, match="all 1 steps were skipped"):
            quiet(diverging(prepared(make_config(changes))))
        assert load_config(folder / "previous" / "config.yaml").config.train.steps == 1
        mmfn.load_hf(folder / "previous" / "checkpoint")
    quiet(prepared(make_config(changes)))
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint", "config.yaml", "metrics.jsonl", "report.html"]


def diverging(run: Run) -> Run:
    for leaf in tree.leaves(run.state["params"]):
        leaf.fill_(float("nan"))
    return run


def test_a_run_that_diverges_fails_and_its_files_are_valid_json(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"all 4 steps were skipped.*lower optimizer.lr or check weights and data"):
        quiet(diverging(prepared(make_config())))
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    assert json.loads((tmp_path / "run" / "eval.json").read_text(), parse_constant=pytest.fail)["loss"] is None
    changes = {"optimizer.lr": 1e30, "data.eval": None, "output.path": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="the training diverged, the loss of the last step is"):
        quiet(prepared(make_config(changes)))


def test_data_that_break_on_the_way_leave_no_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    run = prepared(make_config({"data.check": "first", "data.workers": 0}))
    real = run.loader.dataset

    class Breaking:
        def __len__(self) -> int:
            return len(real)

        def place(self, index: int) -> str:
            return real.place(index)

        def sample(self, index: int) -> Any:
            if index in run.loader.indices(2):
                raise ValueError("image broke")
            return real.sample(index)

    run.loader.packer = replace(run.loader.packer, reader=replace(run.loader.reader, dataset=Breaking()))
    with pytest.raises(ValueError, match="image broke"):
        quiet(run)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.yaml", "metrics.jsonl"]
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] in (1, 2)


def test_prefetched_batches_weigh_to_the_mean(make_config: MakeConfig) -> None:
    run = prepared(make_config({"data.token_buckets": [64], "data.tower_buckets": {"vision": [64]}}))
    for microbatches in prefetch(run.loader.microbatches, range(2), Workers()):
        weighed = weigh(microbatches, per_token_loss)
        assert sum(b.weights_T.sum().item() for b in weighed) == pytest.approx(1.0, rel=1e-6)


def test_write_text_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_model_on_an_unknown_device_is_refused() -> None:
    for device in ("gpu", "meta", "meta:x", "cuda:77"):
        with pytest.raises(ValueError, match=f"model.device '{device}' cannot be used"):
            find_device(device)
