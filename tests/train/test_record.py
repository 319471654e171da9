"""The record of a step: every key is documented, and every figure is that of a recount."""

import io
import re
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
from mmfn.train.run import loop, record
from mmfn.train.run.progress import Progress, format_line
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
