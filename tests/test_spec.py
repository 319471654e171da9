"""What is derived from a tree of specs."""

import pytest
import torch

from mmfn import spec, tree
from mmfn.lora import add_adapters, lora
from mmfn.parallel.program import Program
from mmfn.parallel.transforms.precision import precision
from mmfn.spec import (
    ONES,
    ZEROS,
    Init,
    ParamSpec,
    freeze,
    init_params,
    meta_params,
    model_dtype,
    normal,
    num_params,
    num_trained,
    rules_of,
    stacks,
    trained_paths,
    uniform,
)

SPECS = {
    "embed": spec.spec((300, 40), "vocab embed", normal(0.5)),
    "layers": [
        {"w": spec.spec((7, 5), "mlp embed", normal(2.0)), "b": spec.spec((7,), "mlp", ZEROS)} for _ in range(2)
    ],
    "norm": spec.spec((40,), "embed", ONES),
    "scale": spec.spec((), "", ONES),
}


def test_init_follows_the_specs() -> None:
    params = init_params(SPECS, seed=0)
    assert tree.paths(params) == tree.paths(SPECS)
    for path, leaf in tree.items(params):
        want = dict(tree.items(SPECS))[path]
        assert leaf.shape == want.shape
        assert leaf.dtype == torch.float32
    assert params["embed"].std().item() == pytest.approx(0.5, rel=0.03)
    assert params["embed"].mean().item() == pytest.approx(0.0, abs=0.02)
    assert torch.equal(params["norm"], torch.ones(40))
    assert torch.equal(params["layers"][0]["b"], torch.zeros(7))
    assert not torch.equal(params["layers"][0]["w"], params["layers"][1]["w"])


def test_a_leaf_depends_on_seed_and_path_only() -> None:
    whole, part = init_params(SPECS, seed=3), init_params({"layers": SPECS["layers"], "other": SPECS["norm"]}, seed=3)
    assert torch.equal(whole["layers"][1]["w"], part["layers"][1]["w"])
    assert not torch.equal(whole["embed"], init_params(SPECS, seed=4)["embed"])
    before = torch.get_rng_state()
    init_params(SPECS, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_dtype_is_a_cast_of_the_same_draw() -> None:
    full, half = init_params(SPECS, seed=0), init_params(SPECS, seed=0, dtype=torch.bfloat16)
    assert torch.equal(full["embed"].bfloat16(), half["embed"])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_a_declared_dtype_wins_over_a_narrower_one(dtype) -> None:
    specs = {
        "bias": ParamSpec(shape=(3,), axes=("router",), init=ONES, dtype=torch.float32),
        "steps": ParamSpec(shape=(), axes=(), init=ZEROS, dtype=torch.int64),
        "weight": spec.spec((3, 4), "router embed", normal(1.0)),
    }
    params = init_params(specs, 0, dtype)
    bias = torch.float64 if dtype == torch.float64 else torch.float32
    want = {"bias": bias, "steps": torch.int64, "weight": dtype or torch.float32}
    assert {path: leaf.dtype for path, leaf in tree.items(params)} == want
    assert {path: leaf.dtype for path, leaf in tree.items(meta_params(specs, dtype))} == want
    assert model_dtype(params, specs) == want["weight"]
    assert model_dtype({"bias": params["bias"]}, specs) == torch.float32  # no leaf of the model's dtype
    program = precision(compute=torch.bfloat16)(Program.of(specs))
    assert [leaf.compute for leaf in tree.leaves(program.specs)] == [torch.float32, torch.int64, None]
    program = precision(compute=torch.bfloat16, rules={"bias": torch.float64})(Program.of(specs))
    assert [leaf.compute for leaf in tree.leaves(program.specs)] == [torch.float64, torch.int64, None]


def test_adapters_have_the_models_dtype() -> None:
    """Not that of a leaf which declares one, first in path order as it may be."""
    bias = ParamSpec(shape=(3,), axes=("router",), init=ONES, dtype=torch.float32)
    plain = {"bias": bias, "up": {"weight": spec.spec((2, 3), "mlp embed", normal(1.0))}}
    specs = lora(plain, rank=1, alpha=1.0, targets=["up"])
    params = add_adapters(init_params(plain, 0, torch.bfloat16), specs, 0)
    assert {path for path, leaf in tree.items(params) if leaf.dtype == torch.float32} == {"bias"}


def test_the_widest_dtype_is_the_models() -> None:
    specs = {name: spec.spec((2,), "embed", ONES) for name in "ab"}
    for dtypes, want in (
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
        ((torch.float16, torch.float16), torch.float16),
    ):
        params = {name: torch.ones(2, dtype=dtype) for name, dtype in zip("ab", dtypes, strict=True)}
        assert model_dtype(params, specs) == want


def test_meta_params_hold_no_memory() -> None:
    huge = {"w": spec.spec((10**6, 10**6), "vocab embed", normal(1.0))}
    leaf = meta_params(huge, torch.bfloat16)["w"]
    assert leaf.device.type == "meta"
    assert leaf.shape == (10**6, 10**6)
    assert leaf.dtype == torch.bfloat16
    assert num_params(huge) == 10**12


def test_num_params_counts_init() -> None:
    assert num_params(SPECS) == sum(x.numel() for x in tree.leaves(init_params(SPECS, seed=0))) == 300 * 40 + 84 + 41
    assert num_params({}) == 0


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has 2 dims but axes \('embed',\) name 1"):
        spec.spec((2, 3), "embed", ZEROS)
    with pytest.raises(ValueError, match="Init kind 'orthogonal' is unknown"):
        Init(kind="orthogonal")
    with pytest.raises(ValueError, match="rule 'balance' and a gradient would both update a leaf; set is_frozen=True"):
        ParamSpec(shape=(3,), axes=("router",), init=ZEROS, rule="balance")
    for dtype, name in (
        (torch.bfloat16, "torch.bfloat16"),
        (None, "the dtype of the model"),
        (torch.int64, "torch.int64"),
    ):
        with pytest.raises(ValueError, match=f"rule 'balance' updates a leaf of {name}, which .* dtype=torch.float32"):
            ParamSpec(shape=(3,), axes=("router",), init=ZEROS, dtype=dtype, is_frozen=True, rule="balance")


def test_a_leaf_is_trained_by_gradient_by_a_rule_or_not_at_all() -> None:
    same = {"init": ZEROS, "dtype": torch.float64}
    bias = ParamSpec(shape=(7,), axes=("router",), **same, is_frozen=True, rule="balance")
    specs = {"bias": bias, "weight": spec.spec((7, 3), "router embed", ONES), "norm": spec.spec((3,), "embed", ONES)}
    assert trained_paths(specs) == ["norm", "weight"]
    assert rules_of(specs) == {"bias": "balance"}
    assert num_trained(specs) == 24
    assert rules_of(freeze(specs, ["norm"])) == {"bias": "balance"}
    assert rules_of(freeze(specs, ["bias"])) == {}
    layers = {"router": specs, "up": {"weight": spec.spec((2, 3), "mlp embed", ONES)}}
    for keep, rules in ((), {}), (["router/bias"], {"router/bias": "balance"}):
        adapted = lora(layers, rank=1, alpha=1.0, targets=["up"], keep=keep)
        assert rules_of(adapted) == rules
        assert trained_paths(adapted) == ["up/lora/weight/a", "up/lora/weight/b"]


def test_stacks_are_those_of_the_tree_the_text_last() -> None:
    norm = SPECS["norm"]
    specs = {"text": {"layers": [{"norm": norm}] * 3}, "scale": norm, "head": {"weight": norm}, "eye": {"layers": []}}
    assert {name: len(blocks) for name, blocks in stacks(specs).items()} == {"eye": 0, "text": 3}
    assert list(stacks(specs)) == ["eye", "text"]


def test_uniform_draws() -> None:
    value = init_params({"a": spec.spec((200, 300), "lora embed", uniform(0.3))}, seed=0)["a"]
    assert 0.2999 < value.abs().max() <= 0.3
    assert value.mean().item() == pytest.approx(0.0, abs=2e-3)
    assert value.std().item() == pytest.approx(0.3 / 3**0.5, rel=0.01)


def test_freeze_adds_to_what_is_frozen() -> None:
    some = freeze(SPECS, [r"layers/0/.*"])
    assert trained_paths(some) == ["embed", "layers/1/b", "layers/1/w", "norm", "scale"]
    assert trained_paths(freeze(some, ["embed", "scale"])) == ["layers/1/b", "layers/1/w", "norm"]
    assert num_trained(some) == num_params(SPECS) - 42
    assert freeze(SPECS, []) == SPECS
    with pytest.raises(ValueError, match="matches none of 7 paths"):
        freeze(SPECS, ["head"])
    with pytest.raises(ValueError, match="leaves no parameter to train"):
        freeze(some, ["embed", "layers/1/.*", "norm", "scale"])
