"""Steps of adapters that drop: one gradient however samples are packed, split and recomputed; another at every step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfn
from mmfn import rng, tree
from mmfn.batch import Batch, Sample, in_floats
from mmfn.lora import adapters_of, add_adapters, lora
from mmfn.models import FAMILIES
from mmfn.parallel.mesh.layout import Mesh, single_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.program import Program, Transform, pipe
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.remat import remat
from mmfn.train.build.run import prepare
from mmfn.train.config.load import Loaded, load_config
from mmfn.train.optim import adamw
from mmfn.train.step import State, init_state, make_step
from mmfn.tree import Tree
from tests import oracles
from tests.train.rank_cases import LAYOUTS, MakeConfig, take_steps
from tests.train.test_step import (
    QUIET_DYNAMO,
    RATE,
    SPLITS,
    Counter,
    bucketed,
    distance,
    packed,
    run,
    samples,
    wide,
)

TARGETS = (r"(text|vision)/.*/attention/(q|o|qkv)", r"vision/(merger|deepstack/0)/up")


def model_of(family: str) -> Any:
    """A tiny model in float64."""
    model = mmfn.init(oracles.to_dict(oracles.config(family=family)), seed=0)
    return replace(model, params=tree.map(lambda x: 20 * x.double() if x.ndim > 1 else x.double(), model.params))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


def with_adapters(params: Tree, specs: Tree) -> Tree:
    """Copies, with adapters that matter."""

    def draw(path: str, leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=rng.generator(0, path), dtype=leaf.dtype)
        return 0.3 * noise if "/lora/" in path else leaf.clone()

    return tree.map_with_path(draw, add_adapters(params, specs, 0))


def build(model: Any, *transforms: Transform, dropout: float = 0.25, seed: int = 0) -> tuple[Any, State]:
    """A step whose first moment is the gradient, and its first state."""
    specs = lora(model.family.specs(model.cfg), rank=2, alpha=4.0, targets=TARGETS, dropout=dropout)
    optimizer, program = adamw(betas=(0.0, 0.9)), pipe(Program.of(specs), *transforms)
    step = make_step(model.family, model.cfg, program, "per_token_loss", optimizer, schedule=RATE, seed=seed)
    return step, init_state(with_adapters(model.params, specs), optimizer, specs)


def gradients(model: Any, microbatches: Sequence[Batch], *transforms: Transform, at: int = 0, **kw: Any) -> Any:
    """`{path: gradient}` of a step, and its loss under "loss"."""
    step, state = build(model, *transforms, **kw)
    state, metrics = step(state | {"step": torch.tensor(at)}, [wide(b) for b in microbatches])
    return state["opt"]["m"] | {"loss": metrics["loss"]}


def numbered(model: Any, num: int) -> list[Sample]:
    """Samples in an order of data, from somewhere in it."""
    rows = [replace(s, number=100 + i) for i, s in enumerate(samples(3, num, model))]
    assert sum(bool(s.images) for s in rows) >= 2
    return rows


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def size(want: Any) -> float:
    """What an error is relative to: the largest value, or 1."""
    return max(1.0, *(leaf.abs().max().item() for leaf in tree.leaves(want)))


@pytest.mark.parametrize("split", SPLITS)
def test_a_gradient_does_not_depend_on_the_split(model: Any, split: str) -> None:
    """Nor on the order of samples in a batch, or on padding; dropout is what makes it what it is."""
    if model.family.name == "qwen3_vl_moe":  # of which the balancing loss is per micro-batch
        model = replace(model, cfg=replace(model.cfg, router_aux_coef=0.0))
    rows = numbered(model, 7)
    want = gradients(model, [packed(model, rows)])
    parts = [packed(model, part) for part in SPLITS[split](rows)]
    padded = [packed(model, p, tokens=160, patches=240, segment_multiple=4) for p in SPLITS[split](rows)]
    for microbatches in (parts, padded):
        assert distance(gradients(model, microbatches), want) < 1e-12 * size(want)
    assert distance(gradients(model, [packed(model, rows)], dropout=0.0), want) > 1e-3


def test_masks_are_functions_of_seed_step_and_sample(model: Any) -> None:
    rows = numbered(model, 4)
    batch = packed(model, rows)
    want = gradients(model, [batch], at=3)
    assert equal(gradients(model, [batch], at=3), want), "the same step, bitwise"
    others = {
        "step": gradients(model, [batch], at=4),
        "seed": gradients(model, [batch], at=3, seed=1),
        "sample": gradients(model, [packed(model, [replace(s, number=s.number + 4) for s in rows])], at=3),
        "sample, by default": gradients(model, [packed(model, [replace(s, number=None) for s in rows])], at=3),
    }
    for name, other in others.items():
        for path, leaf in want.items():
            assert (other[path] - leaf).abs().max() > 1e-6, f"{name}: {path}"


def test_steps_go_on_from_their_number(model: Any) -> None:
    """The second of two steps is the step of a run that starts at 1 from its state."""
    batch = wide(packed(model, numbered(model, 4)))
    step, state = build(model)
    state, _ = step(state, [batch])
    kept = tree.map(torch.clone, state)
    _, metrics = step(state, [batch])
    _, again = build(model)[0](kept, [batch])
    assert torch.equal(metrics["loss"], again["loss"])


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_what_is_computed_again_drops_the_same(model: Any, kind: str) -> None:
    batch = packed(model, numbered(model, 4))
    again = remat(kind, save=("attention",) if kind == "selective" else ())
    want = gradients(model, [batch])
    assert distance(gradients(model, [batch], again), want) < 1e-12 * size(want)


def test_a_base_that_was_frozen_is_left_alone(model: Any) -> None:
    step, state = build(model)
    before = tree.map(torch.clone, state["params"])
    for _ in range(2):  # the learning rate of the first step is 0
        state, _ = step(state, [wide(packed(model, numbered(model, 4)))])
    for (path, new), old in zip(tree.items(state["params"]), tree.leaves(before), strict=True):
        assert torch.equal(new, old) == ("/lora/" not in path), path


@QUIET_DYNAMO
@pytest.mark.parametrize("kind", ["layer", pytest.param("step", marks=pytest.mark.slow)])
def test_compiled_equals_eager_without_recompiling(kind: str) -> None:
    """Every step has other masks and the same graphs, no more of them than without dropout."""
    model = model_of("qwen3_vl")
    first, second, third = (wide(b) for step in bucketed(model) for b in step)
    single, several = [[first], [second], [third], [first]], [[first, second], [third, second, first]]
    num_graphs = []
    for dropout in (0.0, 0.25):
        torch._dynamo.reset()
        backend = Counter()
        graphed, got = build(model, compiled(kind, backend=backend), dropout=dropout)
        eager, want = build(model, dropout=dropout)
        for steps in (single, several):
            want, expected = run(eager, want, steps)
            got, found = run(graphed, got, steps)
            assert distance(got, want) < 1e-9
            for name in ("loss", "grad_norm"):
                torch.testing.assert_close([m[name] for m in found], [m[name] for m in expected], rtol=1e-10, atol=0)
        num_graphs.append(backend.graphs)
    assert num_graphs[0] == num_graphs[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_through_the_loader(make_config: MakeConfig, name: str) -> None:
    """From a config, in float64: ranks and micro-batches deal the samples, which keep their numbers."""
    path = make_config({"lora.rank": 2, "lora.targets": list(TARGETS[:1]), "lora.dropout": 0.2, "train.seed": 5})

    def steps(mesh: Mesh, loaded: Loaded) -> tuple[list[dict[str, float]], Tree]:
        def start(params: Tree, specs: Tree) -> Tree:
            assert {x.dropout for x in adapters_of(specs).values()} == {loaded.config.lora.dropout}
            return with_adapters(params, specs)

        return take_steps(mesh, loaded, start)

    want, leaves = steps(single_mesh(), load_config(path, ["data.token_buckets=[512]"]))
    plain, _ = steps(single_mesh(), load_config(path, ["data.token_buckets=[512]", "lora.dropout=0.0"]))
    assert abs(plain[0]["loss"] - want[0]["loss"]) > 1e-4
    loaded = load_config(path, LAYOUTS[name])
    for found, own in virtual(loaded.config.layout.sizes, lambda mesh: steps(mesh, loaded)):
        for metrics, expected in zip(found, want, strict=True):
            assert metrics == pytest.approx(expected, rel=1e-10)
        for a, b in zip(tree.leaves(leaves), tree.leaves(own), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


def test_the_seed_of_a_run_is_that_of_its_masks(make_config: MakeConfig) -> None:
    """With b zero as at the start of a run, the loss does not show what is dropped but the gradient of b does."""
    path = make_config({"lora.rank": 2, "data.check": "first"})
    for dropout, is_same in ((0.3, False), (0.0, True)):
        settings = [[f"lora.dropout={dropout}", f"train.seed={seed}"] for seed in (0, 1)]
        runs = [prepare(load_config(path, own), lambda text: None) for own in settings]
        share = runs[0].loader.share(0)
        batches = [in_floats(batch) for batch in share.microbatches]
        found = [run.step(tree.map(torch.clone, runs[0].state), batches)[1] for run in runs]
        assert found[0]["loss"] == found[1]["loss"]
        assert (found[0]["grad_norm"] == found[1]["grad_norm"]) == is_same
