"""Training on a mesh from a config, its ranks in one process: the numbers and files of one device."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from mmfn import tree
from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import run_virtual, virtual
from mmfn.train.build.run import Run, prepare
from mmfn.train.config.load import Loaded, load_config
from mmfn.train.data import agree
from mmfn.train.forward import Forward
from mmfn.train.run.evaluate import evaluate
from mmfn.train.run.progress import Progress
from mmfn.train.run.result import Result
from mmfn.train.run.training import run_training
from tests.train.rank_cases import LAYOUTS, SMALL, MakeConfig, take_steps, train

CPU = torch.device("cpu")
NUMBERS = ("loss", "grad_norm", "samples", "tokens", "supervised", "media_tokens")


def on_ranks(loaded: Loaded, work: Callable[[Run], Any]) -> list[Any]:
    """`work(run)` on all ranks of a config's layout, in one process."""

    def rank(mesh: Mesh) -> Any:
        place = Place(device=CPU, mesh=mesh, host=mesh)
        return work(prepare(loaded, lambda text: None, place))

    return virtual(loaded.config.layout.sizes, rank)


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
    expected, leaves = take_steps(single_mesh(), load_config(path, ["data.token_buckets=[512]"]))
    loaded = load_config(path, LAYOUTS[name])
    world = run_virtual(loaded.config.layout.sizes, lambda mesh: take_steps(mesh, loaded))
    kinds = [[(c.axis, c.name, c.site) for c in calls] for calls in world.calls]
    assert all(calls == kinds[0] for calls in kinds)
    for metrics, own in world.results:
        for one, other in zip(expected, metrics, strict=True):
            assert other == pytest.approx(one, rel=1e-10)
        for a, b in zip(tree.leaves(leaves), tree.leaves(own), strict=True):
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


def test_evaluation_is_divided_and_its_answers_are_the_first_ranks(make_config: MakeConfig) -> None:
    run = prepare(load_config(make_config()), lambda text: None)
    settings: Any = {"max_new_tokens": 3, "eos_token_ids": run.eos_token_ids}
    alone = evaluate(Forward.of(run.model), run.held_out, batch_samples=24, **settings)
    done: list[int] = []

    def work(mesh: Mesh) -> Any:
        forward = replace(Forward.of(run.model), axis=mesh["world"])
        return evaluate(forward, run.held_out, batch_samples=4, on_batch=done.append, **settings)

    for rank, found in enumerate(virtual(Layout(dp=5), work)):  # 24 entries: ranks have 5 or 4
        assert found.answers == (alone.answers if rank == 0 else ())  # a rank does not hold what the others answered
        assert found.num_tokens == alone.num_tokens
        assert found.loss_sum == pytest.approx(alone.loss_sum, rel=1e-5)
    assert sorted(done) == [4] * 6 + [5] * 4  # the last one computes an idle row


def test_ranks_write_what_one_device_writes(make_config: MakeConfig, tmp_path: Path) -> None:
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
    assert all(isinstance(leaf, DTensor) for result in results for leaf in tree.leaves(result.model.params))
    assert [result.saved for result in results] == [{"checkpoint": several / "checkpoint"}] * 2
    assert [len(result.evaluation.answers) for result in results] == [24, 0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["layout.dp=3", "data.batch_samples=2"],
            r"batch_samples is 2 but must be at least replicate 1 \* dp 3, one for each rank",
        ),
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
