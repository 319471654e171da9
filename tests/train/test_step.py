"""The training step on a tiny Qwen3-VL: against transformers, over any split, compiled, donated, non-finite."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfn
from mmfn import ops, tree
from mmfn.batch import IGNORE, IMAGE, Batch, Sample, to
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.compiled import compiled
from mmfn.train.optim import Transform, adamw, by_path, chain, clip_by_global_norm
from mmfn.train.schedule import schedule
from mmfn.train.step import State, Step, init_state, make_step
from tests import oracles
from tests.batches import packed, wide, with_inputs
from tests.tiny import random_samples

# torch's compiler reads `.grad` of non-leaf inputs and hides the warning by a means that "error" defeats
QUIET_DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
NO_DECAY = (r".*norm/weight", r".*bias")
RATE = schedule("cosine", peak=1e-2, num_steps=20, warmup_steps=2)


@pytest.fixture(scope="module")
def model() -> Any:
    return mmfn.init(oracles.config().to_dict(), seed=0)


def optimizer() -> Transform:
    """`eps` keeps the update smooth where the gradient is no more than rounding."""
    return chain(clip_by_global_norm(1.0), by_path(adamw(weight_decay=0.1, eps=1e-5), no_decay=NO_DECAY))


def build(model: Any, kind: str = "none", *, backend: Any = "aot_eager", donate: bool = True, **kw: Any) -> Step:
    program = pipe(Program.of(model.family.specs(model.cfg)), compiled(kind, backend=backend))
    return make_step(
        model.family,
        model.cfg,
        program,
        kw.pop("objective", "per_token_loss"),
        optimizer(),
        schedule=RATE,
        donate=donate,
    )


def fresh(model: Any, dtype: torch.dtype = torch.float32) -> State:
    return init_state(tree.map(lambda x: x.to(dtype, copy=True), model.params), optimizer())


def samples(seed: int, num: int, model: mmfn.Model) -> list[Sample]:
    """Conversations with up to two images each; numbers, which seed them, are not theirs."""
    return random_samples(model, seed, num, kinds=(IMAGE,), is_numbered=False)


BUCKET = {"tokens": 96, "patches": 96, "segments": 6}


def bucketed(model: Any) -> list[list[Batch]]:
    """Three steps in one bucket, with 4, 1 and 3 segments; the second has no image at all."""
    text = [s for s in samples(9, 12, model) if not s.images][:1]
    return [[packed(model, rows, **BUCKET)] for rows in (samples(1, 4, model), text, samples(2, 3, model))]


def distance(a: Any, b: Any) -> float:
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


# ---- against transformers


def test_three_steps_equal_transformers_with_torch_adamw_and_clip(tmp_path: Any) -> None:
    oracle = oracles.build(oracles.config(tie_word_embeddings=False)).double().train()
    ours = mmfn.load_hf(oracles.save(oracle, tmp_path))
    named = dict(oracle.named_parameters())
    skip = ("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight", "bias")
    groups = [
        {"params": [p for n, p in named.items() if not n.endswith(skip)], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if n.endswith(skip)], "weight_decay": 0.0},
    ]
    torch_adamw = torch.optim.AdamW(groups, lr=1.0, eps=1e-5)
    tx = chain(clip_by_global_norm(1.0), by_path(adamw(weight_decay=0.1, eps=1e-5), no_decay=NO_DECAY))
    program = Program.of(ours.family.specs(ours.cfg))
    step = make_step(ours.family, ours.cfg, program, "per_token_loss", tx, schedule=RATE)
    state = init_state(ours.params, tx)
    assert tree.leaves(ours.params)[0].dtype == torch.float64
    for i in range(3):
        inputs = oracles.inputs(oracle.config, i, rows=3)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
        labels = labels.masked_fill(inputs["mm_token_type_ids"] != 0, IGNORE)
        inputs = {k: v.double() if k.startswith("pixel") else v for k, v in inputs.items()}
        for group in torch_adamw.param_groups:
            group["lr"] = RATE(torch.tensor(i)).item()
        torch_adamw.zero_grad()
        loss = oracle(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
        torch_adamw.step()
        batch = wide(mmfn.batch_from_hf({**inputs, "labels": labels}, ours))
        state, metrics = step(state, [batch])
        torch.testing.assert_close(metrics["loss"].float(), loss.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(metrics["grad_norm"], norm, rtol=1e-5, atol=0)
        assert metrics["tokens"].item() == int((labels[:, 1:] != IGNORE).sum())
    got = mmfn.to_hf(state["params"], ours)
    assert got.keys() == named.keys()
    moved = 0.0
    for name, p in named.items():
        torch.testing.assert_close(got[name].reshape(p.shape), p.detach(), rtol=1e-4, atol=2e-5, msg=name)
        moved = max(moved, (p.detach() - p.detach().mean()).abs().max().item())
    assert moved > 0


# ---- any split of a global batch


def gradient_step(model: Any, microbatches: Sequence[Batch], objective: str) -> tuple[State, dict[str, Tensor]]:
    """A step whose first moment, with beta1 = 0 and no clip, is the gradient itself."""
    tx = adamw(betas=(0.0, 0.9))
    program = Program.of(model.family.specs(model.cfg))
    step = make_step(model.family, model.cfg, program, objective, tx, schedule=RATE)
    return step(init_state(tree.map(Tensor.double, model.params), tx), [wide(b) for b in microbatches])


SPLITS: dict[str, Callable[[list[Sample]], list[list[Sample]]]] = {
    "alone": lambda s: [[x] for x in s],
    "halves": lambda s: [s[:3], s[3:]],
    "uneven": lambda s: [s[:1], s[1:6], s[6:]],
    "reversed": lambda s: [s[::-1]],
    "interleaved": lambda s: [s[::3], s[1::3], s[2::3]],
}


@pytest.mark.parametrize("split", SPLITS)
def test_per_token_gradient_does_not_depend_on_the_split(model: Any, split: str) -> None:
    rows = samples(3, 7, model)
    assert sum(bool(s.images) for s in rows) >= 3
    whole, expected = gradient_step(model, [packed(model, rows)], "per_token_loss")
    parts = [packed(model, part) for part in SPLITS[split](rows)]
    state, metrics = gradient_step(model, parts, "per_token_loss")
    assert distance(whole["opt"]["m"], state["opt"]["m"]) < 1e-12
    assert max(x.abs().max().item() for x in whole["opt"]["m"].values()) > 1e-3
    assert metrics["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-12)
    assert metrics["tokens"].item() == expected["tokens"].item() > 0


def test_default_objective_depends_on_the_split_but_not_on_padding(model: Any) -> None:
    rows = samples(3, 5, model)
    whole, _ = gradient_step(model, [packed(model, rows)], "default")
    split, _ = gradient_step(model, [packed(model, rows[:1]), packed(model, rows[1:])], "default")
    padded, _ = gradient_step(model, [packed(model, rows, tokens=128, patches=160, segments=9)], "default")
    assert distance(whole["opt"]["m"], split["opt"]["m"]) > 1e-4
    assert distance(whole["opt"]["m"], padded["opt"]["m"]) < 1e-12


def test_bfloat16_microbatches_accumulate_in_float32(model: Any) -> None:
    rows = samples(3, 4, model)
    state = fresh(model, torch.bfloat16)
    parts = [to(packed(model, [r]), "cpu", torch.bfloat16) for r in rows]
    state, metrics = build(model)(state, parts)
    assert all(x.dtype == torch.bfloat16 for x in tree.leaves(state["params"]))
    assert metrics["grad_norm"].dtype == torch.float32
    _, expected = build(model)(fresh(model), [packed(model, [r]) for r in rows])
    assert metrics["loss"].item() == pytest.approx(expected["loss"].item(), rel=2e-2)
    assert metrics["grad_norm"].item() == pytest.approx(expected["grad_norm"].item(), rel=5e-2)


# ---- compiled


@dataclass
class Counter:
    """A backend that counts the graphs it is given."""

    graphs: int = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Tensor]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(gm, example_inputs)


def run(step: Step, state: State, steps: Sequence[Sequence[Batch]]) -> tuple[State, list[dict[str, Tensor]]]:
    """All steps; none behind the first may compile anything."""
    logged = []
    for i, microbatches in enumerate(steps):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            state, metrics = step(state, microbatches)
        logged.append(metrics)
    return state, logged


def poisoned(batch: Batch) -> Batch:
    """The batch with one patch value that is not a number."""

    def poison(inputs_UF: Tensor) -> Tensor:
        bad_UF = inputs_UF.clone()
        bad_UF[0, 0] = torch.nan
        return bad_UF

    return with_inputs(batch, poison)


@QUIET_DYNAMO
@pytest.mark.parametrize(("kind", "single", "several"), [("layer", 3, 3), ("step", 1, 3)])
def test_compiled_equals_eager_in_few_graphs_without_recompiling(
    model: Any, kind: str, single: int, several: int
) -> None:
    """layer: a graph for all text blocks, one for all vision blocks, one update. step: one in all; with several
    micro-batches, however many, one for the gradient of each and one update."""
    torch._dynamo.reset()
    backend = Counter()
    eager, graphed = build(model), build(model, kind, backend=backend)
    steps = bucketed(model)
    first, second, third = (b for step in steps for b in step)
    steps.insert(2, [poisoned(first)])
    want, want_logged = run(eager, fresh(model), steps)
    state, logged = run(graphed, fresh(model), steps)
    assert backend.graphs == single
    assert distance(state, want) < 2e-6
    assert [m["skipped"].item() for m in logged] == [0, 0, 1, 0]
    for name in ("loss", "grad_norm", "lr", "tokens"):
        torch.testing.assert_close(
            [m[name] for m in logged], [m[name] for m in want_logged], rtol=1e-5, atol=0, equal_nan=True
        )
    more = [[first, second], [first, second, third], [third, second]]
    want, _ = run(eager, want, more)
    state, _ = run(graphed, state, more)
    assert backend.graphs == several
    assert distance(state, want) < 4e-6
    assert distance(want["params"], model.params) > 1e-3


# ---- donation and non-finite steps


def test_donate(model: Any) -> None:
    batches = bucketed(model)
    state = fresh(model)
    before = tree.map(torch.clone, state)
    kept, _ = build(model, donate=False)(state, batches[0])
    kept, _ = build(model, donate=False)(kept, batches[1])
    assert distance(state, before) == 0.0
    params = tree.leaves(state["params"])
    given, _ = build(model, donate=True)(state, batches[0])
    given, _ = build(model, donate=True)(given, batches[1])
    assert all(a is b for a, b in zip(tree.leaves(given["params"]), params, strict=True))
    assert distance(given, kept) == 0.0
    assert given["step"].item() == 2


def test_the_same_step_twice_is_bitwise_equal(model: Any) -> None:
    a, _ = run(build(model), fresh(model), bucketed(model))
    b, _ = run(build(model), fresh(model), bucketed(model))
    assert distance(a, b) == 0.0


def test_a_nonfinite_step_advances_the_step_only(model: Any) -> None:
    batches = bucketed(model)
    step = build(model)
    state, metrics = step(fresh(model), batches[0])
    assert metrics["skipped"].item() == 0
    before = tree.map(torch.clone, state)
    state, metrics = step(state, [poisoned(batches[2][0])])
    assert metrics["skipped"].item() == 1
    assert not torch.isfinite(metrics["grad_norm"])
    assert distance(state["params"], before["params"]) == 0.0
    assert distance(state["opt"], before["opt"]) == 0.0
    assert state["step"].item() == 2
    state, metrics = step(state, batches[1])
    assert metrics["skipped"].item() == 0
    assert state["opt"][1]["count"].item() == 2


def test_nothing_supervised(model: Any) -> None:
    rows = [replace(s, labels_T=torch.full_like(s.labels_T, IGNORE)) for s in samples(1, 3, model)]
    _, metrics = build(model)(fresh(model), [packed(model, rows)])
    assert metrics["loss"].item() == metrics["grad_norm"].item() == metrics["tokens"].item() == 0
    assert metrics["skipped"].item() == 0
    mixed, expected = build(model)(fresh(model), [packed(model, samples(1, 3, model))])
    both, got = build(model)(fresh(model), [packed(model, rows), packed(model, samples(1, 3, model))])
    assert got["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    assert distance(both["params"], mixed["params"]) < 1e-6


def test_reference_ops_give_the_same_step(model: Any) -> None:
    program = Program.of(model.family.specs(model.cfg), ops.reference())
    step = make_step(model.family, model.cfg, program, "per_token_loss", optimizer(), schedule=RATE)
    batches = [[wide(b) for b in microbatches] for microbatches in bucketed(model)]
    state, _ = run(step, fresh(model, torch.float64), batches)
    expected, _ = run(build(model), fresh(model, torch.float64), batches)
    assert distance(state["params"], expected["params"]) < 1e-9


def test_errors(model: Any) -> None:
    with pytest.raises(ValueError, match="no micro-batch"):
        build(model)(fresh(model), [])
    with pytest.raises(ValueError, match="objective 'per_token' is unknown"):
        build(model, objective="per_token")
    with pytest.raises(ValueError, match="matches none of"):
        make_step(
            model.family,
            model.cfg,
            Program.of(model.family.specs(model.cfg)),
            "default",
            by_path(adamw(), no_decay=["nothing"]),
            schedule=RATE,
        )
