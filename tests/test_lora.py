"""Adapters against the plain model with merged weights: values and gradients, in every place they can stand."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

import mmfn
from mmfn import lora as adapters
from mmfn import ops as op_tables
from mmfn import rng, spec, tree
from mmfn.batch import to
from mmfn.lora import Adapter, adapters_of, add_adapters, insert, lora, merge, salts_of, with_drops
from mmfn.models import FAMILIES
from mmfn.models.layers import linear
from mmfn.spec import freeze, trained_paths
from mmfn.train.objective import loss_fn
from tests import oracles
from tests.tiny import scale_of

ALL = (r".*/attention/(q|k|v|o|qkv)", r".*/mlp/(gate|up|down)", r"vision/(merger/(up|down)|deepstack/0/up)")
EXPERTS = (r".*/experts/(gate_up|down)",)
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def model_of(family: str) -> Any:
    """A tiny model in float64."""
    model = mmfn.init(oracles.to_dict(oracles.config(family=family, tie_word_embeddings=False)), seed=0)
    return replace(model, params=tree.map(lambda x: 20 * x.double() if x.ndim > 1 else x.double(), model.params))


def adapted(model: Any, **settings: Any) -> tuple[Any, Any]:
    """The model with adapters none of whose leaves is zero, and its specs."""
    targets = ALL + (EXPERTS if "moe" in model.family.name else ())
    specs = lora(model.family.specs(model.cfg), **({"rank": 3, "alpha": 2.0, "targets": targets} | settings))

    def draw(path: str, leaf: Tensor) -> Tensor:
        g = rng.generator(0, path)
        return 0.2 * torch.randn(leaf.shape, generator=g, dtype=leaf.dtype) if "/lora/" in path else leaf

    params = tree.map_with_path(draw, add_adapters(model.params, specs, 0))
    return replace(model, params=params), specs


def batch_of(model: Any) -> Any:
    batch = mmfn.batch_from_hf(oracles.inputs(oracles.config(family=model.family.name), 0), model)
    return to(batch, "cpu", torch.float64)


@pytest.mark.parametrize("is_rs", [False, True])
def test_a_linear_layer_is_that_of_the_merged_weight(is_rs: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x_TD, w, a, b, bias = (
        torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 7), (4, 7), (2, 7), (4, 2), (4,))
    )
    adapter = Adapter(a=a, b=b, alpha=3.0, is_rs=is_rs)
    scale = 3 / 2**0.5 if is_rs else 3 / 2
    assert adapter.scale == pytest.approx(scale)
    got = linear.apply({"weight": w, "bias": bias, "lora": {"weight": adapter}}, x_TD, op_tables.portable())
    want = torch_linear(x_TD, w + scale * b @ a, bias)
    torch.testing.assert_close(got, want, **TIGHT)
    seed = torch.randn(got.shape, generator=g, dtype=torch.float64)
    inputs = (x_TD, w, a, b, bias)
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, seed), torch.autograd.grad(want, inputs, seed), strict=True
    ):
        torch.testing.assert_close(mine, theirs, **TIGHT)


@pytest.mark.parametrize("names", [("gate_up",), ("down",), ("gate_up", "down")])
@pytest.mark.parametrize("counts", [(3, 0, 4), (0, 0, 0), (2, 5, 1)])
def test_experts_with_adapters(names: tuple[str, ...], counts: tuple[int, ...]) -> None:
    """The grouped products of the portable table against one expert after the other on merged weights."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)

    weights: dict[str, Any] = {"gate_up": draw(3, 8, 5), "down": draw(3, 5, 4)}
    own = {
        name: Adapter(
            a=draw(3, 2, weights[name].shape[2]), b=draw(3, weights[name].shape[1], 2), alpha=3.0, is_rs=False
        )
        for name in names
    }
    x_RD, counts_E = draw(9, 5), torch.tensor(counts)
    merged = {n: w + 1.5 * own[n].b @ own[n].a if n in own else w for n, w in weights.items()}
    inputs = [x_RD, *weights.values(), *(leaf for adapter in own.values() for leaf in (adapter.a, adapter.b))]
    want = op_tables.reference().experts(x_RD, counts_E, merged)
    seed = torch.randn(want.shape, generator=g, dtype=torch.float64)
    for table in (op_tables.reference(), op_tables.portable()):
        got = table.experts(x_RD, counts_E, {**weights, "lora": own})
        torch.testing.assert_close(got, want, **TIGHT)
        pairs = zip(_grads(got, inputs, seed), _grads(want, inputs, seed), strict=True)
        assert all(torch.allclose(mine, theirs, **TIGHT) for mine, theirs in pairs)


def _grads(out: Tensor, inputs: list[Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    if not out.requires_grad:
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(out, inputs, seed, allow_unused=True, materialize_grads=True, retain_graph=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_the_merged_one_does(family: str) -> None:
    """Logits, the gradient of what is not adapted, and the gradients of a and b by the chain rule through the merge."""
    model, _ = adapted(model_of(family))
    batch = batch_of(model)
    logits_TV = mmfn.logits(model, batch)
    seed = torch.randn(logits_TV.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(params: Any, through: Any) -> Tensor:
        return (mmfn.logits(replace(model, params=through(params)), batch) * seed).sum()

    plain, grads = mmfn.value_and_grad(value)(model.params, lambda params: params)
    merged, expected = mmfn.value_and_grad(value)(model.params, merge)
    torch.testing.assert_close(plain, merged, rtol=1e-9, atol=0)
    for (path, mine), theirs in zip(tree.items(grads), tree.leaves(expected), strict=True):
        assert (mine - theirs).abs().max() <= 1e-9 * scale_of(theirs, torch.float64), path
    assert tree.paths(merge(model.params)) == tree.paths(model.family.specs(model.cfg))


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_through_the_cache(family: str) -> None:
    model, _ = adapted(model_of(family))
    batch = batch_of(model)
    ids = mmfn.generate(model, batch, max_new_tokens=5)
    assert ids == mmfn.generate(replace(model, params=merge(model.params)), batch, max_new_tokens=5)
    assert ids == mmfn.generate(model, batch, max_new_tokens=5, ops=op_tables.reference())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_hands_its_rows_to_what_drops(family: str) -> None:
    """Blocks of the text get the ids of tokens, those of the tower ids of patches, mergers those of first patches."""
    model = model_of(family)
    plain = model.family.specs(model.cfg)
    targets = [re.escape(layer) for layer, weight in adapters.layers(plain).items() if layer != weight]
    specs = lora(plain, rank=2, alpha=2.0, targets=targets, dropout=0.25)  # every layer that can have dropout
    params = add_adapters(model.params, specs, 0)
    salts_at = salts_of(specs, 5)
    assert salts_at is not None
    salts = salts_at(torch.tensor(3), torch.device("cpu"))
    assert salts.keys() == adapters_of(specs).keys()
    assert len({int(salt) for salt in salts.values()}) == len(salts)
    batch, gathered = replace(batch_of(model), salts=salts), []

    def gather(node: Any) -> Any:
        gathered.append(node)
        return node

    table = replace(op_tables.portable(), gather=gather)
    loss_fn(params, batch, model.family, model.cfg, table)
    told = {int(a.drops.salt): a.drops.ids_T for node in gathered for a in adapters_of(node).values()}
    for path, salt in salts.items():
        ids = batch.token_ids_T if path.startswith("text/") else batch.towers[path.partition("/")[0]].ids_P
        ids = ids[::4] if path.startswith(("vision/merger", "vision/deepstack")) else ids
        assert torch.equal(told.pop(int(salt)), ids), path
    assert not told

    assert with_drops(params, [], None) is params
    with pytest.raises(ValueError, match="has dropout but the family does not say which rows it computes with"):
        with_drops(params, [("vision/", batch.token_ids_T)], salts)
    assert tree.paths(params) == tree.paths(specs), "what is dropped is no part of the parameters"


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_dropped_outside_of_training(family: str) -> None:
    """Loss, logits and generation of a model whose adapters drop are, bitwise, those of one whose adapters never do."""
    model = model_of(family)
    targets = (r".*/attention/(q|qkv)", r"vision/merger/up")
    specs = [lora(model.family.specs(model.cfg), rank=2, alpha=8.0, targets=targets, dropout=p) for p in (0.0, 0.5)]

    def draw(path: str, leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=rng.generator(0, path), dtype=leaf.dtype)
        return noise if "/lora/" in path else leaf

    models = [replace(model, params=tree.map_with_path(draw, add_adapters(model.params, s, 0))) for s in specs]
    batch = batch_of(model)
    batch = replace(batch, labels_T=batch.tokens_T)
    assert torch.equal(*(mmfn.logits(m, batch) for m in models))
    (values, grads) = zip(*(mmfn.value_and_grad(value_of)(m.params, batch, m) for m in models), strict=True)
    assert torch.equal(*values)
    assert all(torch.equal(x, y) for x, y in zip(*(tree.leaves(g) for g in grads), strict=True))
    assert len({str(mmfn.generate(m, batch, max_new_tokens=4)) for m in models}) == 1
    assert salts_of(specs[0], 0) is None
    salts_at = salts_of(specs[1], 0)
    assert salts_at is not None
    dropped = replace(batch, salts=salts_at(torch.tensor(0), torch.device("cpu")))
    assert abs(value_of(models[1].params, dropped, models[1]) - values[0]) > 1e-3


def value_of(params: Any, batch: Any, model: Any) -> Tensor:
    return mmfn.loss(params, batch, model)[0]


def test_the_spec_tree() -> None:
    model = model_of("qwen3_vl_moe")
    plain = model.family.specs(model.cfg)
    specs = lora(plain, rank=2, alpha=4, targets=EXPERTS + ALL[:1], keep=(r"text/norm/.*",))
    leaves = dict(tree.items(specs))
    assert leaves["text/layers/0/attention/q/lora/weight/a"].shape == (2, 36)
    assert leaves["text/layers/0/attention/k/lora/weight/b"].axes == ("kv_heads", "lora")
    assert leaves["text/layers/0/moe/experts/lora/gate_up/a"].axes == ("experts", "lora", "embed")
    assert leaves["text/layers/1/moe/experts/lora/down/b"].shape == (6, 36, 2)
    trained = trained_paths(specs)
    assert all("/lora/" in path or path == "text/norm/weight" for path in trained)
    assert len(trained) == 1 + 2 * (2 * 4 + 2 * 2 + 2 * 2)
    found = adapters_of(specs)
    assert found.keys() == {p for p in leaves if f"{p.rpartition('/')[0]}/lora/{p.rpartition('/')[2]}/a" in leaves}
    assert insert(freeze(plain, [p for p in tree.paths(plain) if p != "text/norm/weight"]), found) == specs
    params = spec.init_params(specs, 3)
    assert {p: v.shape for p, v in tree.items(params)} == {p: s.shape for p, s in leaves.items()}
    again = add_adapters(spec.init_params(plain, 3), specs, 3)
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(params), tree.leaves(again), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": (r"text/layers/\d+/attention/w",)}, "matches none of"),
        ({"targets": (r"head",)}, "matches none of"),  # part of the loss
        ({"targets": (r"text/embed",)}, "matches none of"),
        ({"targets": (r"vision/patch_embed",)}, "matches none of"),  # a convolution where adapters are exchanged
        ({"targets": (r"text/layers/0/moe/router",)}, "matches none of"),
        ({"targets": ()}, "got no targets"),
        ({"rank": 0}, "a rank of at least 1"),
        ({"alpha": 0.0}, "a positive alpha"),
        ({"alpha": float("inf")}, "a positive alpha that is finite"),
        ({"dropout": 1.0}, "dropout is 1.0 but must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1 but must be"),
        (
            {"dropout": 0.1, "targets": ALL[:1] + EXPERTS},
            "dropout is 0.1 but 'text/layers/0/moe/experts/down' is a stack of experts, .* leave experts out",
        ),
        ({"keep": (r"text/nrom/weight",)}, "matches none of"),
        ({"keep": (r"text/layers/0/attention/q/weight",)}, "kept trainable and has an adapter"),
    ],
)
def test_what_has_no_meaning_is_refused(settings: dict[str, Any], message: str) -> None:
    model = model_of("qwen3_vl_moe")
    with pytest.raises(ValueError, match=message):
        lora(model.family.specs(model.cfg), **({"rank": 2, "alpha": 1.0, "targets": ALL[:1]} | settings))


def test_merging_rounds_once() -> None:
    g = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=g) for shape in ((4, 6), (2, 6), (4, 2)))
    node = {"weight": weight.bfloat16(), "lora": {"weight": Adapter(a=a, b=b, alpha=1.0, is_rs=False)}}
    got = merge({"x": [node]})["x"][0]
    want = (weight.bfloat16().double() + 0.5 * b.double() @ a.double()).bfloat16()
    assert got.keys() == {"weight"}
    assert torch.equal(got["weight"], want)
    assert adapters.adapters_of({"x": [node]}).keys() == {"x/0/weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_cover_every_parameter_once(family: str) -> None:
    """A family says where its parts are, with and without a head of its own."""
    for is_tied in (False, True):
        model = mmfn.init(oracles.to_dict(oracles.config(family=family, tie_word_embeddings=is_tied)), seed=0)
        specs, parts = model.family.specs(model.cfg), model.family.parts(model.cfg)
        assert ("lm_head" in parts) == (not is_tied)
        for path in tree.paths(specs):
            owners = [part for part, pattern in parts.items() if re.fullmatch(pattern, path)]
            assert len(owners) == 1, path
