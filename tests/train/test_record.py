"""The record of a step: every key is documented, and every figure is that of a recount."""

import gc
import io
import json
import math
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmfn.batch import AUDIO, IMAGE, VIDEO
from mmfn.parallel.planning.devices import DEVICES, peak_flops
from mmfn.train.build.run import Run, prepare
from mmfn.train.config.load import load_config
from mmfn.train.run import loop, record, recorded
from mmfn.train.run.progress import Progress, format_line
from mmfn.train.run.resume import Start
from mmfn.train.watch import Watch
from tests.train.rank_cases import train
from tests.train.test_ranks import on_ranks

MakeConfig = Callable[..., Path]
PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented() -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def prepared(config: Path, *overrides: str) -> Run:
    return prepare(load_config(config, overrides), say=lambda text: None)


def test_the_page_names_every_key(make_config: MakeConfig) -> None:
    with_peak = train(prepared(make_config(), "train.peak_tflops=2"))
    without = train(prepared(make_config(), "data.check=first"))
    assert len(documented()) == len(set(documented()))
    assert all(set(one) == set(documented()) for one in with_peak)
    assert all(set(one) == set(documented()) - {"mfu"} for one in without)
    assert set(record.OF_MACHINE) < set(documented())
    for one in with_peak:
        assert one["mfu"] == pytest.approx(one["tflops_per_s"] / 2, rel=1e-2, abs=1e-6)


def test_counts_are_those_of_an_offline_recount(make_config: MakeConfig) -> None:
    run = prepared(make_config())
    steps = [[run.loader.dataset.sample(i) for i in run.loader.indices(step)] for step in range(4)]
    for one, samples in zip(train(run), steps, strict=True):
        kinds_T = torch.cat([s.kinds_T for s in samples])
        kinds = {kind: int((kinds_T == kind).sum()) for kind in (IMAGE, VIDEO, AUDIO)}
        assert [one["image_tokens"], one["video_tokens"], one["audio_tokens"]] == list(kinds.values())
        assert one["text_tokens"] == kinds_T.numel() - sum(kinds.values()) > 0
        assert one["image_tokens"] == one["media_tokens"] > 0
        assert one["supervised"] == sum(int((s.labels_T[1:] != -100).sum()) for s in samples)


def test_flops_and_tokens_of_a_mesh_are_those_of_one_device(make_config: MakeConfig) -> None:
    path = make_config({"data.batch_samples": 7, "data.check": "first", "data.eval": None})
    keys = ("flops", "tokens", "text_tokens", "image_tokens", "supervised")
    one = train(prepared(path))
    for layout in (("layout.dp=3",), ("layout.dp=2", "layout.cp=2", "data.token_buckets=[64, 128]")):
        loaded = load_config(path, (*layout, "data.tower_buckets={vision: [64]}"))
        ranks = on_ranks(loaded, train)
        for records in ranks:
            assert [[r[k] for k in keys] for r in records] == [[r[k] for k in keys] for r in one]
            assert [r["encoder_imbalance"] for r in records] == [r["encoder_imbalance"] for r in ranks[0]]
        num, images = loaded.config.layout.sizes.dp, 7
        most = -(-images // num)  # each sample has one image, and all are of one size
        assert ranks[0][0]["encoder_imbalance"] == pytest.approx(most * num / images, abs=1e-4)
        assert ranks[0][0]["tokens_per_s_per_device"] < ranks[0][0]["tokens_per_s"]
    assert all(r["encoder_imbalance"] == 1 for r in one)


@dataclass
class Pause:
    """A save behind step 2 that takes half a minute of a clock."""

    now: list[float]

    def is_due(self, step: int, loss: float | None = None) -> bool:
        return step == 2

    def __call__(self, state: Any, cursor: Any, loss: float | None = None) -> None:
        self.now[0] += 30.0


def test_a_step_is_waiting_and_computing(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: every step has its own times, also where its record is not read late."""
    run = prepared(make_config({"data.workers": 0}))
    now, real = [100.0], run.loader.steps

    def steps(*args: Any, **settings: Any) -> Any:
        for i, share in enumerate(real(*args, **settings)):
            now[0] += 2.0 + i
            yield share

    def step(state: Any, microbatches: Any) -> Any:
        now[0] += 10.0
        return run.step(state, microbatches)

    monkeypatch.setattr(run.loader, "steps", steps)
    for module in (record, loop):
        monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    records: list[dict[str, Any]] = []
    loop.train(replace(run, step=step), records.append, keep=Pause(now))
    assert [r["wait_s"] for r in records] == [2, 3, 4, 5]
    assert [r["compute_s"] for r in records] == [10] * 4
    assert [r["step_s"] for r in records] == [12, 13, 14, 15]
    total = sum(r["flops"] for r in records) / 54e12
    assert records[-1]["tflops_per_s"] == pytest.approx(total, abs=1e-6)
    assert records[-1]["tokens_per_s"] == pytest.approx(sum(r["tokens"] for r in records) / 54, abs=0.05)


def test_skips_are_counted_on(make_config: MakeConfig) -> None:
    meter = record.Meter(9, 4, skipped=3)
    facts = {"step": 5, "tokens": 1, "flops": 0}
    first = meter.finish(facts, {"skipped": torch.tensor(1)}, meter.lap())
    second = meter.finish({**facts, "step": 6}, {"skipped": torch.tensor(0)}, meter.lap())
    assert [first["skipped_steps"], second["skipped_steps"]] == [4, 4]


def test_what_is_said_once(make_config: MakeConfig) -> None:
    plain = record.notes(prepared(make_config()))
    assert plain[0].endswith("frozen parts forward alone; set train.peak_tflops for MFU")
    assert re.search(r"vision: .* vision rows .*; text: .* tokens \+ .* token pairs \+ .* labels", plain[1])
    with_peak = record.notes(prepared(make_config(), "train.peak_tflops=376"))
    assert with_peak[0].startswith("MFU = model FLOPs / (devices x 376 TFLOP/s x time)")


def test_peaks_of_devices_by_what_torch_calls_them() -> None:
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "Ascend910B2": "910b", "Ascend910_9392": "a3"}
    for name, known in names.items():
        assert peak_flops(name) == DEVICES[known].flops
    assert peak_flops("NVIDIA GeForce GTX 970") is None


def test_memory_is_what_the_process_held(make_config: MakeConfig) -> None:
    one = train(prepared(make_config({"train.steps": 1})))[0]
    assert one["memory_bytes"] > 50 * 2**20
    assert "memory=" in format_line(one, 1)


def test_the_bar_of_a_run_that_goes_on_begins_where_the_run_does() -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    with Progress(num_steps=8, log_every=1, stream=stream) as progress:
        for step in (7, 8):
            progress.show({"step": step, "loss": 1.0, "lr": 1e-3, "tokens_per_s": 5.0})
            assert progress.bar is not None
            assert (progress.bar.n, progress.bar.initial) == (step, 6)
    assert "| 8/8 [" in stream.getvalue()


def test_an_accelerator_is_asked_for_its_name_and_its_peak(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By functions that the modules of all devices have."""
    asked = SimpleNamespace(get_device_name=lambda device: "Ascend910B2", max_memory_allocated=lambda device: 123)
    monkeypatch.setattr(torch, "get_device_module", lambda device: asked)
    run = prepared(make_config())
    there = replace(run, place=replace(run.place, device=torch.device("cuda:1")))
    machine = record.Machine.of(there)
    assert (machine.peak, machine.memory_bytes()) == (376e12, 123)
    config = run.loaded.config
    told = config.model_copy(update={"train": config.train.model_copy(update={"peak_tflops": 5.0})})
    assert record.Machine.of(replace(there, loaded=replace(run.loaded, config=told))).peak == 5e12


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_holds_no_more_after_more_steps(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The records of a million steps would be 5 GB, on every rank of a machine."""
    run, held = prepared(make_config({"data.eval": None})), list[int]()
    mesh = run.place.host
    axes = {**mesh.axes, "world": replace(mesh["world"], index=rank)}
    run = replace(run, place=replace(run.place, host=replace(mesh, axes=axes)))
    one = train(prepared(make_config({"data.eval": None, "train.steps": 1})))[0]

    def take(run: Run, emit: Any, *args: Any, **settings: Any) -> Any:
        for step in range(1, 2001):
            emit({name: value + step for name, value in one.items()} | {"step": step, "tokens": 7})
            if step in (500, 2000):
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
        return run.state

    monkeypatch.setattr(recorded, "train", take)
    (tmp_path / "run").mkdir()
    progress = Progress(num_steps=10**6, log_every=10**6, stream=io.StringIO())
    tracemalloc.start()
    try:
        _, tally = recorded.train_recorded(run, tmp_path / "run", progress, Start(), Watch())
    finally:
        tracemalloc.stop()
    assert held[1] - held[0] < 100_000  # 2.6 MB, were they kept
    assert (tally.num_steps, tally.num_tokens) == (2000, 14000)
    assert [r["step"] for r in tally.last] == list(range(2001 - record.RATE_STEPS, 2001))


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(record.read_records(path)) == []
    path.write_text("".join(json.dumps({"step": step, "loss": 0.1 * step}) + "\n" for step in range(1, 9)) + '{"step"')
    with open(path, "a", encoding="utf-8") as file:
        file.write(': 9, "loss": null}\n')
    (last,) = record.read_records(path, 8)
    assert math.isnan(last["loss"])
    assert list(record.read_records(path, 2, 4)) == [{"step": 3, "loss": 0.1 * 3}, {"step": 4, "loss": 0.1 * 4}]
