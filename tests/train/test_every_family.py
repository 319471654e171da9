"""What no other matrix generates over all families: one list of checks, each on every tiny model.

A family joins by its line in `tests.tiny.TINY`. Which test proves which mechanism is drawn in docs/support.md.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mmfn
from mmfn import models, ops, tree
from mmfn.batch import IGNORE
from mmfn.interop.files import SINGLE
from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.mesh.layout import Layout, Mesh, distributed_mesh
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.remat import remat
from mmfn.train.objective import OBJECTIVES, Objective
from mmfn.train.optim import adamw, chain, clip_by_global_norm, on_host
from mmfn.train.planning.step_trace import PlannedStep, trace_step
from mmfn.train.planning.workload import Workload
from tests import tiny
from tests.batches import packed, wide
from tests.parallel import campaign, conformance
from tests.parallel.ranks import run_ranks

NAMES = [name for name in tiny.TINY if name != "small"]  # that one is for graphs alone
OF_MMFN = [name for name in NAMES if tiny.family_of(name).name in models.FAMILIES]
PLAIN = campaign.Draw(
    seed=0,
    family="",
    num_layers=2,
    layout=Layout(dp=2),
    kind="",
    remat="none",
    offload=(),
    head="",
    gathered="",
    capacity=False,
    ties="",
    trained="all",
    objective="",
    z_loss=1e-2,
    smoothing=0.1,
    optimizer="adamw",
    dtype=torch.float64,
    micro_batches=2,
    is_released=False,
)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", NAMES)
def test_two_steps_are_those_of_the_written_formula(name: str, objective: str) -> None:
    """Micro-batches, ranks and samples weighted as the objective says; further tokens that a model predicts too."""
    campaign.check(replace(PLAIN, family=name, objective=objective))


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "rules", "ema"])
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_writes_what_its_formula_says(name: str, optimizer: str) -> None:
    """`rules`: AdamW with single parameters treated unlike the others."""
    campaign.check(replace(PLAIN, family=name, objective="per_token_loss", optimizer=optimizer))


def mesh_cell(name: str) -> conformance.Cell:
    """Tokens and parameters over ranks, and experts where there are any."""
    layout = Layout(cp=2, ep=2 if tiny.has_experts(name) else 1)
    return conformance.Cell(
        layout=layout,
        name="processes",
        transforms=(data_parallel(), conformance.spread("gather", name), expert_parallel(), remat("full")),
        family=name,
        pack={"segment_multiple": segment_multiple("gather", layout)},
    )


def outcomes(names: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    """Runs on every rank: a step of each family."""
    return [conformance.outcome(cell, distributed_mesh(cell.layout)) for cell in map(mesh_cell, names)]


@pytest.fixture(scope="module")
def processes() -> list[dict[str, dict[str, torch.Tensor]]]:
    """Of each of two processes what it found, by name of the model."""
    return [dict(zip(NAMES, found, strict=True)) for found in run_ranks(2, outcomes, NAMES)]


@pytest.mark.dist
@pytest.mark.xdist_group("processes of every family")
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_take_the_step_of_one(name: str, processes: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    for found in processes:
        conformance.check_outcome(mesh_cell(name), found[name])


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_the_loss_are_those_of_whole_logits(name: str) -> None:
    model = tiny.model_of(name)
    batch = wide(packed(model, tiny.random_samples(model, 3, 4)))
    assert int((batch.labels_T != IGNORE).sum()) > 2 * 5, "chunks of 5, the last of another size"
    run = mmfn.value_and_grad(mmfn.loss, has_aux=True)
    chunked = Objective(weighting=OBJECTIVES["per_token_loss"], chunk=5)
    (value, _), grads = run(model.params, batch, model, objective=chunked)
    (want, _), expected = run(model.params, batch, model, ops=ops.reference())
    for got, one in zip([value, *tree.leaves(grads)], [want, *tree.leaves(expected)], strict=True):
        torch.testing.assert_close(got, one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_on_the_host_gives_the_same_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = conformance.Cell(layout=Layout(dp=2), name="on host", transforms=(data_parallel(),), family=name)
    conformance.one_device(cell)
    monkeypatch.setattr(conformance, "adamw", lambda **chosen: on_host(adamw(**chosen), 500))
    conformance.check_cell(cell)


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_counts_what_the_step_does(name: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives, operations and bytes alive in every stretch of a step without values, to the byte."""
    # deterministic mode fills new memory with another operator, which is no part of a step
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    model = tiny.model_of(name)

    def build(cfg: Any, mesh: Mesh) -> Program:
        return pipe(Program.of(model.family.specs(cfg), mesh=mesh), data_parallel(), remat("full"))

    setup = PlannedStep(
        family=model.family,
        cfg=model.cfg,
        build=build,
        optimizer=chain(clip_by_global_norm(0.5), adamw(weight_decay=0.1)),
        workload=Workload(tokens=64, sample_tokens=32, image_side=4),
    )
    trace_step(setup, layout, 2)  # caches of attention
    real, fake = (trace_step(setup, layout, 2, is_fake=is_fake) for is_fake in (False, True))
    assert fake.peak.total > 0
    assert (fake.count, fake.sent_bytes, fake.flops) == (real.count, real.sent_bytes, real.flops)
    assert fake.peaks == real.peaks


@pytest.mark.parametrize("name", OF_MMFN)
def test_what_is_exported_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    """Parameters in bfloat16 but for what declares a dtype, in both layouts; saved again, the files are the same."""
    model = tiny.model_of(name)
    specs = model.family.specs(model.cfg)
    params = tree.map(lambda leaf, spec: leaf.to(spec.dtype or torch.bfloat16), model.params, specs)
    model = replace(model, params=params)
    for layout in ("hub", "transformers"):
        first, second = tmp_path / layout, tmp_path / f"{layout} again"
        mmfn.save_hf(first, model, layout=layout)
        back = mmfn.load_hf(first)
        assert back.cfg == model.cfg
        assert tree.paths(back.params) == tree.paths(params)
        for got, want in zip(tree.leaves(back.params), tree.leaves(params), strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
        mmfn.save_hf(second, back, layout=layout)
        assert (first / SINGLE).read_bytes() == (second / SINGLE).read_bytes()
