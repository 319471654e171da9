"""Runs with skipped steps: they end complete, or stop after so many in a row and say why."""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfn import tree
from mmfn.train.build.run import Run, prepare
from mmfn.train.config.load import load_config
from mmfn.train.run import loop
from mmfn.train.run.progress import Progress
from mmfn.train.run.training import run_training
from mmfn.train.step import State
from tests.batches import with_inputs


def spoil(run: Run, is_bad: Callable[[int], bool]) -> Run:
    """The run with patches that are not numbers in some of its steps."""
    real, calls = run.step, iter(range(10**6))

    def step(state: State, microbatches: Any) -> Any:
        if is_bad(next(calls)):
            microbatches = [with_inputs(microbatches[0], lambda x: x * torch.nan), *microbatches[1:]]
        return real(state, microbatches)

    return replace(run, step=step)


def test_a_run_whose_last_step_is_skipped_is_complete(make_config: Callable[..., Path]) -> None:
    config = make_config({"train.steps": 3, "data.eval": None})
    run = spoil(prepare(load_config(config), say=lambda text: None), lambda step: step == 2)
    result = run_training(run, Progress(num_steps=3, log_every=3, stream=io.StringIO()))
    assert [r["skipped"] for r in result.tally.last] == [0, 0, 1]
    assert math.isnan(result.tally.last[-1]["loss"])
    assert all(x.isfinite().all() for x in tree.leaves(result.model.params))


def test_the_run_stops_after_skips_in_a_row_and_only_then(make_config: Callable[..., Path]) -> None:
    config = make_config({"train.steps": 9, "train.max_skips": 3})
    run = spoil(prepare(load_config(config), say=lambda text: None), lambda step: step in (1, 2, 4, 5, 6, 7))
    records: list[dict[str, Any]] = []
    with pytest.raises(ValueError, match="3 steps in a row were skipped, the last of them step 7 with loss nan"):
        loop.train(run, records.append)
    assert [r["in_a_row"] for r in records] == [0, 1, 2, 0, 1, 2, 3]
    assert [r["skipped"] for r in records] == [0, 1, 1, 0, 1, 1, 1]


def test_a_run_that_stops_over_spikes_names_their_settings(make_config: Callable[..., Path]) -> None:
    changes = {"train.steps": 6, "train.max_skips": 2, "train.spike_window": 2, "train.spike_factor": 2.0}
    run = prepare(load_config(make_config(changes)), say=lambda text: None)
    real = run.step

    def step(state: State, microbatches: Any) -> Any:
        if int(state["step"]) == 2:  # from here on all norms are far above the window
            state = {**state, "guard": {**state["guard"], "norms": state["guard"]["norms"] * 1e-3}}
        return real(state, microbatches)

    message = r"2 steps in a row .* step 4 with loss \d.*; it was a spike, so raise train.spike_factor \(2\), change "
    with pytest.raises(ValueError, match=message + r"train.spike_window \(2; 0 looks for no spikes\)"):
        loop.train(replace(run, step=step), lambda record: None)


def test_a_run_with_spikes_goes_on(make_config: Callable[..., Path]) -> None:
    config = make_config({"train.steps": 4, "train.spike_window": 2, "train.spike_factor": 1.000001})
    records: list[dict[str, Any]] = []
    state = loop.train(prepare(load_config(config), say=lambda text: None), records.append)
    norms = [r["grad_norm"] for r in records]
    skipped = [r["skipped"] for r in records]
    assert skipped[0] == 0
    assert skipped[1] == (norms[1] > 1.000001 * norms[0])
    assert int(state["guard"]["skipped"]) == sum(skipped)
    assert sum(torch.isfinite(state["guard"]["norms"]).tolist()) == min(2, 4 - sum(skipped))
