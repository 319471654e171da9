"""Dtypes of computation and of gradient sums; what travels in which is in `test_gather.py`."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from mmfn import ops as op_tables
from mmfn import tree
from mmfn.lora import Adapter, lora
from mmfn.models.layers import linear, moe, norm
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.program import Program, lower, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.precision import SENSITIVE, precision
from mmfn.parallel.weights.gather import Weight
from mmfn.parallel.weights.sharding import local, shard_params
from mmfn.spec import ZEROS, init_params, spec
from mmfn.train.planning import step_trace
from tests.parallel.conformance import Cell, one_device, outcome, run_cell
from tests.parallel.plan_cases import make
from tests.tiny import model_of

MOE = moe.MoeConfig(d_model=64, d_ff=8, num_experts=64, num_chosen=4, init_std=1.0)
TABLES = {"reference": op_tables.reference(), "portable": op_tables.portable()}


def test_facts() -> None:
    program = pipe(Program.of(None), precision(compute=torch.bfloat16, reduce=torch.float32))
    assert (program.weights.compute, program.weights.reduce) == (torch.bfloat16, torch.float32)
    assert program.notes == ("precision: compute torch.bfloat16, gradient sums torch.float32",)
    assert pipe(Program.of(None), precision()).notes == (
        "precision: compute as stored, gradient sums in float32 or wider",
    )


def test_one_device_computes_in_it_and_keeps_its_parameters() -> None:
    gather = lower(pipe(Program.of(None), precision(compute=torch.bfloat16))).ops.gather
    leaf = torch.randn(3, requires_grad=True)
    out = gather({"a": [leaf]})["a"][0]
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert grad.dtype == leaf.dtype == torch.float32


def dtypes(family: str, **chosen: Any) -> dict[str, torch.dtype]:
    """Path -> the dtype `gather` gives the leaf in, for float64 parameters."""
    model = model_of(family, 2)
    program = lower(pipe(Program.of(model.family.specs(model.cfg)), precision(**chosen)))
    return {
        path: leaf.dtype for path, leaf in tree.items(program.ops.gather(program.enter(model.params, model.params)))
    }


def test_routers_and_norms_stay_float32_unless_rules_say_otherwise() -> None:
    found = dtypes("moe", compute=torch.bfloat16)
    wide = {path for path, dtype in found.items() if dtype == torch.float32}
    assert wide == {path for path in found if "norm" in path or "/router/" in path}
    assert {"text/norm/weight", "text/layers/1/moe/router/weight", "vision/merger/norm/bias"} <= wide
    assert set(found.values()) == {torch.float32, torch.bfloat16}
    assert set(dtypes("moe", compute=torch.bfloat16, rules={}).values()) == {torch.bfloat16}
    assert set(dtypes("moe", compute=torch.float32).values()) == {torch.float32}  # no default rules
    rules = {r"text/layers/0/.*norm/.*": torch.float32, r"text/.*": torch.float16}
    found = dtypes("dense", rules=rules)
    assert found["text/layers/0/mlp_norm/weight"] == torch.float32
    assert found["text/layers/1/mlp_norm/weight"] == torch.float16
    assert found["vision/merger/norm/weight"] == torch.float64


@pytest.mark.parametrize(
    "path",
    [
        "norm/weight",
        "text/layers/3/moe/router/bias",
        "text/layers/0/attention/q_norm/weight",
        "text/layers/0/delta/dt_bias",
    ],
)
def test_sensitive_paths(path: str) -> None:
    assert re.fullmatch(SENSITIVE, path)


@pytest.mark.parametrize("rules", [None, {}])
@pytest.mark.parametrize("path", ["A_log", "text/layers/3/linear_attention/A_log"])
def test_an_exponent_has_the_dtype_that_is_declared(path: str, rules: dict[str, torch.dtype] | None) -> None:
    """Of its name nothing follows: an `A_log` is computed in float32 where its spec says so, whatever the rules."""
    assert not re.fullmatch(SENSITIVE, path)
    plain = spec((3,), "q_heads", ZEROS)
    for declared, want in ((torch.float32, torch.float32), (None, torch.bfloat16)):
        specs = {path: replace(plain, compute=declared), "norm": {"weight": plain}}
        program = lower(pipe(Program.of(specs), precision(compute=torch.bfloat16, rules=rules)))
        params = init_params(specs, 0)
        assert program.ops.gather(program.enter(params, params))[path].dtype == want


@pytest.mark.parametrize("reduce", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["dense", "moe"])
@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2), Layout(replicate=2)], ids=str)
def test_a_step_in_bfloat16_is_near_one_in_float64(layout: Layout, family: str, reduce: Any) -> None:
    """Loss and norm; single gradients of a model this small are noise of rounding where they cancel."""
    transforms = (data_parallel(), precision(compute=torch.bfloat16, reduce=reduce))
    cell = Cell(layout=layout, name="bf16", transforms=transforms, dtype=torch.bfloat16, family=family)
    if layout.world == 1:
        found = outcome(cell, single_mesh())
    else:
        world = run_cell(cell)
        found = world.results[0]
        travels = {(c.site, c.dtype) for c in world.calls[0] if c.site in ("weights", "gradients")}
        both = (torch.bfloat16, torch.float32)
        weights = {("weights", dtype) for dtype in both} if layout.shard > 1 else set()
        assert travels == weights | {("gradients", reduce or torch.float32)}
    want = one_device(cell)
    for name in ("loss", "grad_norm"):
        error = (found[f"metrics/{name}"].double() / want[f"metrics/{name}"] - 1).abs()
        assert 0 < error < 0.03, name
    assert all(x.dtype == torch.float64 for name, x in found.items() if name.startswith("params/"))


@pytest.mark.parametrize(("num_ranks", "least_narrow"), [(8, 0.003), (64, 0.009)])
def test_the_sum_of_bfloat16_gradients_is_rounded_once(num_ranks: int, least_narrow: float) -> None:
    """Over all ranks, where a sum in bfloat16 rounds at every rank and is off by a percent."""
    rows_ND = draw(num_ranks, 2048, dtype=torch.bfloat16)
    exact_D = rows_ND.double().sum(0)
    specs = {"x": spec((2048,), "embed", ZEROS)}

    def error(reduce: torch.dtype | None) -> float:
        def run(mesh: Mesh) -> torch.Tensor:
            leaf = shard_params({"x": torch.zeros(2048)}, specs, mesh)["x"].requires_grad_()
            transforms = (data_parallel(), precision(compute=torch.bfloat16, reduce=reduce))
            gather = lower(pipe(Program.of(specs, mesh=mesh), *transforms)).ops.gather
            (grad,) = torch.autograd.grad(gather({"x": leaf})["x"], leaf, rows_ND[mesh["dp"].index])
            return local(grad)

        sum_D = torch.cat(virtual(Layout(dp=num_ranks), run)).bfloat16()
        return ((sum_D.double() - exact_D).norm() / exact_D.norm()).item()

    assert error(None) < 0.002
    assert error(torch.bfloat16) > least_narrow


def test_a_plan_shows_the_bytes_of_wide_sums() -> None:
    """Weights travel in bfloat16 (sensitive ones in float32), gradients in twice that."""
    sent = []
    for chosen in ({}, {"reduce_dtype": "bfloat16"}):
        setup, layout = make(dp=2, compute_dtype="bfloat16", compute_rules={}, **chosen)
        trace = step_trace.trace_step(setup, layout, 2)
        sent.append(sum(n for key, n in trace.sent_bytes.items() if key.op == "reduce_scatter"))
    assert sent[0] == 2 * sent[1] > 0


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_float32_norm_of_bfloat16_is_one_rounding_from_exact(kind: str, name: str) -> None:
    """Forward and gradients; transformers, whose norms are in bfloat16 then, is not nearer."""
    x_TD, dy_TD = (draw(33, 48, dtype=torch.bfloat16, seed=s) for s in (1, 2))
    params = {"weight": 1 + 0.3 * draw(48, seed=3), "bias": draw(48, seed=4)}
    if kind == "rms":
        params.pop("bias")
    apply = norm.rms if kind == "rms" else norm.layer

    def run(dtype_x: torch.dtype, dtype_p: torch.dtype) -> list[torch.Tensor]:
        x, own = x_TD.to(dtype_x).requires_grad_(), {n: p.to(dtype_p).requires_grad_() for n, p in params.items()}
        y = apply(own, x, 1e-6, TABLES[name])
        assert y.dtype == dtype_x
        grads = torch.autograd.grad(y, [x, *own.values()], dy_TD.to(dtype_x))
        assert [g.dtype for g in grads] == [dtype_x, *[dtype_p] * len(own)]
        return [y.detach(), *grads]

    params = {n: p.to(torch.float32).double() for n, p in params.items()}
    exact = run(torch.float64, torch.float64)
    for got, want in zip(run(torch.bfloat16, torch.float32), exact, strict=True):
        assert (got.double() - want).abs().max() <= (2**-8 if got.dtype == torch.bfloat16 else 1e-5) * want.abs().max()
    if kind == "rms":
        theirs = Qwen3VLTextRMSNorm(48, eps=1e-6).bfloat16()
        theirs.weight.data.copy_(params["weight"])
        error = (run(torch.bfloat16, torch.float32)[0].double() - exact[0]).abs().mean()
        assert error < (theirs(x_TD).double() - exact[0]).abs().mean()


def test_a_float32_router_chooses_as_in_float64() -> None:
    """Of tokens in bfloat16, whose logits would be rounded to few values."""
    params = tree.map(lambda p: p * p.shape[-1] ** -0.5, init_params(moe.specs(MOE), 0))
    x_TD = draw(200, 64, dtype=torch.bfloat16)
    real_T = torch.ones(200, dtype=torch.bool)

    def run(dtype: torch.dtype, router: torch.dtype) -> tuple[torch.Tensor, Any]:
        own = tree.map(lambda p: p.to(dtype), params)
        own["router"] = tree.map(lambda p: p.to(router), params["router"])
        y_TD, statistics = moe.apply(own, x_TD.to(dtype), real_T, cfg=MOE, ops=TABLES["portable"])
        assert y_TD.dtype == dtype
        return y_TD, statistics

    (_, exact), (_, wide), (_, narrow) = (
        run(torch.float64, torch.float64),
        run(torch.bfloat16, torch.float32),
        run(torch.bfloat16, torch.bfloat16),
    )
    assert torch.equal(wide["counts_E"], exact["counts_E"])
    assert not torch.equal(narrow["counts_E"], exact["counts_E"])
    torch.testing.assert_close(wide["probs_E"].double(), exact["probs_E"], rtol=1e-5, atol=0)


def test_rules_for_single_linear_layers() -> None:
    errors = []
    for rules in ({}, {r"(text|vision)/layers/\d+/.*": torch.float32}):
        transforms = (precision(compute=torch.bfloat16, rules=rules),)
        cell = Cell(layout=Layout(), name="rules", transforms=transforms, dtype=torch.bfloat16)
        found, want = outcome(cell, single_mesh()), one_device(cell)
        errors.append((found["metrics/loss"].double() - want["metrics/loss"]).abs())
    assert errors[0] != errors[1]
    assert max(errors) < 0.1


@pytest.mark.parametrize("rules", [{r".*/(q|o)/lora/.*": torch.float32}, {r".*/(q|o)/.*lora/weight/b": torch.float32}])
def test_rules_for_adapters(rules: dict[str, torch.dtype]) -> None:
    """Adapters in another dtype than their layers, and of one whose two leaves differ."""
    transforms = (precision(compute=torch.bfloat16, rules=rules),)
    cell = Cell(
        layout=Layout(), name="rules", transforms=transforms, dtype=torch.bfloat16, family="moe", trained="lora"
    )
    found, want = outcome(cell, single_mesh()), one_device(cell)
    for name in ("loss", "grad_norm"):
        assert 0 < (found[f"metrics/{name}"].double() / want[f"metrics/{name}"] - 1).abs() < 0.03, name


def test_an_adapter_computes_in_its_own_dtype() -> None:
    """Of bfloat16 input exactly what it gives in float32, rounded once."""
    x_TD, weight_FD = draw(7, 16, dtype=torch.bfloat16), torch.zeros(5, 16, dtype=torch.bfloat16)
    a, b = draw(3, 16, dtype=torch.float32, seed=1), draw(5, 3, dtype=torch.float32, seed=2)
    lora = {"weight": Adapter(a=a, b=b, alpha=6.0, is_rs=False)}
    got_TF = linear.apply({"weight": weight_FD, "lora": lora}, x_TD, op_tables.portable())
    assert got_TF.dtype == torch.bfloat16
    want_TF = 2 * x_TD.double() @ (b.double() @ a.double()).T
    torch.testing.assert_close(got_TF.double(), want_TF, rtol=2**-8, atol=1e-4)


def test_a_rule_may_part_a_weight_from_its_bias() -> None:
    """The layer computes in the dtype of its weight, of bfloat16 input as in float32, rounded once."""
    x_TD, weight_FD = draw(7, 16, dtype=torch.bfloat16), draw(5, 16, dtype=torch.float32, seed=1)
    bias_F = draw(5, dtype=torch.bfloat16, seed=2)
    got_TF = linear.apply({"weight": weight_FD, "bias": bias_F}, x_TD, op_tables.portable())
    want_TF = x_TD.double() @ weight_FD.double().T + bias_F.double()
    assert got_TF.dtype == torch.bfloat16
    torch.testing.assert_close(got_TF.double(), want_TF, rtol=2**-8, atol=1e-4)


def test_embedding_and_experts_take_one_dtype() -> None:
    """What tells them apart is refused before the first step; all of them in another dtype than the rest run."""
    model = model_of("moe", 2)
    program = Program.of(lora(model.family.specs(model.cfg), rank=2, alpha=1.0, targets=[r".*/experts/.*"]))
    for rule in (r".*/experts/.*", r".*/experts/lora/down/a", r"text/embed/.*"):
        with pytest.raises(ValueError, match=rf"rule {re.escape(repr(rule))} computes .* give all of them one dtype"):
            pipe(program, precision(compute=torch.bfloat16, rules={rule: torch.float32}))
    vocab = spec((3, 2), "vocab embed", ZEROS)
    untied = {"embed": {"weight": vocab}, "head": {"weight": vocab}}  # the loss casts for the head
    wide = pipe(Program.of(untied), precision(compute=torch.bfloat16, rules={"head/.*": torch.float32}))
    assert wide.specs["head"]["weight"].compute == torch.float32
    transforms = (precision(compute=torch.bfloat16, rules={r"text/(embed/.*|.*/experts/.*)": torch.float32}),)
    cell = Cell(layout=Layout(), name="rules", transforms=transforms, dtype=torch.bfloat16, family="moe")
    error = outcome(cell, single_mesh())["metrics/loss"].double() / one_device(cell)["metrics/loss"] - 1
    assert 0 < error.abs() < 0.03


def test_leaves_of_another_dtype_are_handed_over_by_enter() -> None:
    model = model_of("dense", 2)
    specs = model.family.specs(model.cfg)
    program = lower(pipe(Program.of(specs), precision(rules={"text/norm/weight": torch.float32})))
    entered = tree.items(program.enter(model.params, model.params))
    assert all(isinstance(leaf, Weight) for _, leaf in entered)
    assert [path for path, leaf in entered if leaf.compute] == ["text/norm/weight"]
    assert lower(Program.of(specs)).enter(model.params, model.params) is model.params


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"precision got compute=torch\.int64 but it must be floating-point"):
        precision(compute=torch.int64)
    with pytest.raises(ValueError, match=r"precision got reduce=torch\.bool"):
        precision(reduce=torch.bool)
    with pytest.raises(ValueError, match=r"precision got rules\['a'\]=torch\.int8"):
        precision(rules={"a": torch.int8})
    with pytest.raises(ValueError, match="pattern 'nrom' matches none of"):
        pipe(Program.of(moe.specs(MOE)), precision(rules={"nrom": torch.float32}))
