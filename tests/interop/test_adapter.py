"""Adapters against peft itself: what one writes the other loads, with the same logits and the same gradients."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmfn
from mmfn import tree
from mmfn.interop import adapter
from mmfn.lora import adapters_of, add_adapters, lora, merge
from mmfn.models.keymap import Entry
from tests import oracles
from tests.oracles import ATOL, RTOL

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
LINEAR = (r"text/layers/\d+/attention/(q|k|v|o)", r"text/layers/\d+/mlp/(gate|up|down)")
TOWER = (r"vision/layers/0/(attention/(qkv|o)|mlp/(up|down))", r"vision/merger/(up|down)")
CASES: dict[str, dict[str, Any]] = {
    "attention": {"targets": LINEAR[:1], "rank": 3, "alpha": 5.0},
    "everything": {"targets": (*LINEAR, *TOWER), "rank": 2, "alpha": 2.0, "is_rs": True},
    "some layers": {"targets": (r"text/layers/1/attention/q",), "rank": 4, "alpha": 4.0},
    "kept": {"targets": LINEAR, "rank": 2, "alpha": 2.0, "keep": (r"text/norm/weight", r"vision/merger/norm/.*")},
    "both experts": {"targets": (r".*/experts/(gate_up|down)",), "rank": 3, "alpha": 6.0},
    "experts up": {"targets": (r".*/experts/gate_up", *LINEAR[:1]), "rank": 2, "alpha": 3.0},
    "experts down": {"targets": (r".*/experts/down",), "rank": 2, "alpha": 3.0, "is_rs": True},
    "experts of a layer": {"targets": (r"text/layers/1/.*/experts/.*",), "rank": 2, "alpha": 3.0},
}


class Pair:
    """A model of transformers, the same model here, a batch of both, and what mmfn calls its leaves."""

    def __init__(self, family: str, folder: Path) -> None:
        self.oracle = oracles.build(oracles.config(family=family, tie_word_embeddings=False))
        self.oracle.save_pretrained(folder)  # of a thinker what it is alone, as peft has it
        self.path = folder
        self.model = mmfn.load_hf(self.path)
        self.inputs = oracles.inputs(self.oracle.config, 0)
        self.batch = mmfn.batch_from_hf(self.inputs, self.model)
        self.plain = self.model.family.specs(self.model.cfg)

    def adapted(self, case: dict[str, Any]) -> tuple[Any, Any]:
        """Adapters that count, and leaves kept trainable moved off the base."""
        specs = lora(self.plain, **case)
        g = torch.Generator().manual_seed(3)
        base = dict(tree.items(self.model.params))
        params = add_adapters(self.model.params, specs, seed=1)

        def draw(path: str, leaf: Any, value: Tensor) -> Tensor:
            return value if leaf.is_frozen else value + 0.1 * torch.randn(value.shape, generator=g)

        moved = tree.map_with_path(draw, specs, params)
        assert all(torch.equal(dict(tree.items(moved))[p], v) for p, v in base.items() if "keep" not in case)
        return replace(self.model, params=moved), specs

    def with_peft(self, folder: Path) -> Any:
        """The oracle with the adapter of a folder, loaded by peft."""
        cfg = self.oracle.config
        fresh = oracles.oracle_class(cfg).from_pretrained(self.path, config=cfg, attn_implementation="eager")
        fresh.set_experts_implementation("eager")
        return peft.PeftModel.from_pretrained(fresh.eval(), folder, is_trainable=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {name: Pair(name, tmp_path_factory.mktemp(name)) for name in oracles.TYPES}


def pair_of(pairs: dict[str, Pair], name: str) -> Pair:
    return pairs["qwen3_vl_moe" if "expert" in name else "qwen3_vl"]


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_is_saved_here(name: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    """Logits, and the gradient of every adapter leaf by the names peft gives them."""
    check_in_peft(pair_of(pairs, name), CASES[name], tmp_path)


@pytest.mark.parametrize("family", oracles.TYPES)
def test_peft_loads_the_adapters_of_every_family(family: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    """Beside the layers that get them where nobody names any."""
    targets = pairs[family].model.family.lora_targets
    check_in_peft(pairs[family], {"targets": targets, "rank": 2, "alpha": 6.0}, tmp_path)


def check_in_peft(pair: Pair, case: dict[str, Any], tmp_path: Path) -> None:
    model, specs = pair.adapted(case)
    adapter.save(tmp_path / "adapter", model, specs, base=str(pair.path))
    theirs = pair.with_peft(tmp_path / "adapter")
    want_TV = oracles.real_logits(theirs, pair.inputs)
    got_TV, atol = mmfn.logits(model, pair.batch), oracles.narrow_atol(oracles.model_type(pair.oracle.config))
    torch.testing.assert_close(got_TV, want_TV, rtol=RTOL, atol=atol)
    assert (got_TV - mmfn.logits(pair.model, pair.batch)).abs().max() > 0.05, "the adapter counts"

    weights_TV = torch.randn(got_TV.shape, generator=torch.Generator().manual_seed(7)) / got_TV.shape[0]
    (want_TV * weights_TV).sum().backward()
    _, grads = mmfn.value_and_grad(
        lambda params: (mmfn.logits(replace(model, params=params), pair.batch) * weights_TV).sum()
    )(model.params)
    named = adapter.disk_tensors(specs, pair.plain, model.family.key_map(model.cfg))
    mine = {key: entry.to_disk(dict(tree.items(grads))[entry.path]) for key, entry in named.items()}
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            own = mine.pop(key.replace(".default", "").replace(".modules_to_save", ""))
            scale = max(1.0, parameter.grad.abs().max().item())
            torch.testing.assert_close(
                own, parameter.grad, rtol=RTOL, atol=atol * scale, msg=lambda m, k=key: f"{k}: {m}"
            )
    assert not mine, "peft trains what is trained here"


@pytest.mark.parametrize("name", CASES)
def test_it_loads_here_again(name: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pair_of(pairs, name)
    model, specs = pair.adapted(CASES[name])
    adapter.save(tmp_path / "adapter", model, specs)
    again = adapter.load(tmp_path / "adapter", pair.model)
    for (path, a), (other, b) in zip(tree.items(model.params), tree.items(again.params), strict=True):
        assert path == other
        assert torch.equal(a, b), path
    assert adapter.read(tmp_path / "adapter", pair.plain, model.family.key_map(model.cfg)) == specs


SAVED_BY_PEFT: dict[str, dict[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 8},
    "a regular expression": {"target_modules": r".*visual.*\.(qkv|linear_fc1)", "r": 2, "lora_alpha": 2},
    "rslora and dropout": {"target_modules": ["gate_proj"], "r": 4, "use_rslora": True, "lora_dropout": 0.1},
    "modules to save": {"target_modules": ["o_proj"], "r": 2, "modules_to_save": ["input_layernorm", "lm_head"]},
    "experts": {"target_modules": ["k_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "experts alone": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "r": 3},
}


@pytest.mark.parametrize("name", SAVED_BY_PEFT)
def test_an_adapter_saved_by_peft_loads_here(name: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pair_of(pairs, name)
    config = peft.LoraConfig(**SAVED_BY_PEFT[name])
    theirs = peft.get_peft_model(copy.deepcopy(pair.oracle), config).eval()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
    theirs.save_pretrained(tmp_path)
    model = adapter.load(tmp_path, pair.model)
    want_TV = oracles.real_logits(theirs, pair.inputs).detach()
    torch.testing.assert_close(mmfn.logits(model, pair.batch), want_TV, rtol=RTOL, atol=ATOL)
    merged = replace(model, params=merge(model.params))
    torch.testing.assert_close(mmfn.logits(merged, pair.batch), want_TV, rtol=RTOL, atol=ATOL)
    mmfn.save_hf(tmp_path / "merged", merged)  # has every name of the plain model
    assert (want_TV - mmfn.logits(pair.model, pair.batch)).abs().max() > 0.05


def test_dropout_is_written_and_read(pairs: dict[str, Pair], tmp_path: Path) -> None:
    """It is a setting of training on, there and here; outside of training the adapter computes what it did."""
    pair = pairs["qwen3_vl"]
    model, specs = pair.adapted(CASES["attention"] | {"dropout": 0.15})
    adapter.save(tmp_path / "adapter", model, specs)
    theirs = pair.with_peft(tmp_path / "adapter")
    assert theirs.peft_config["default"].lora_dropout == 0.15
    drops = [m for name, m in theirs.named_modules() if name.endswith("lora_dropout.default")]
    assert drops
    assert {(type(m), m.p) for m in drops} == {(torch.nn.Dropout, 0.15)}
    want_TV = oracles.real_logits(theirs.eval(), pair.inputs).detach()
    again = adapter.load(tmp_path / "adapter", pair.model)
    torch.testing.assert_close(mmfn.logits(again, pair.batch), want_TV, rtol=RTOL, atol=ATOL)
    assert {x.dropout for x in adapters_of(again.params).values()} == {0.15}
    assert adapter.read(tmp_path / "adapter", pair.plain, model.family.key_map(model.cfg)) == specs

    theirs.save_pretrained(tmp_path / "theirs")
    assert adapter.read(tmp_path / "theirs", pair.plain, model.family.key_map(model.cfg)) == specs


def test_neither_has_dropout_for_experts(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["qwen3_vl_moe"]
    config = peft.LoraConfig(target_modules=["k_proj"], target_parameters=["experts.down_proj"], lora_dropout=0.1)
    with pytest.raises(ValueError, match="does not work with lora_dropout != 0"):
        peft.get_peft_model(copy.deepcopy(pair.oracle), config)
    adapter.save(tmp_path / "adapter", *pair.adapted(CASES["experts up"]))
    stored = json.loads((tmp_path / "adapter" / adapter.CONFIG).read_text())
    (tmp_path / "adapter" / adapter.CONFIG).write_text(json.dumps(stored | {"lora_dropout": 0.1}))
    with pytest.raises(ValueError, match=r"dropout is 0.1 but '.*/experts/gate_up' is a stack of experts"):
        adapter.load(tmp_path / "adapter", pair.model)


def test_a_is_drawn_as_peft_draws_it(pairs: dict[str, Pair]) -> None:
    """Uniform with the variance 1 / (3 in) of `kaiming_uniform_(a=sqrt(5))`; b is zero, so nothing changes at first."""
    pair = pairs["qwen3_vl_moe"]
    targets = (r".*/attention/q", r".*/experts/.*")
    specs = lora(pair.plain, rank=32, alpha=32, targets=targets)
    params = add_adapters(pair.model.params, specs, seed=0)
    theirs = peft.get_peft_model(
        copy.deepcopy(pair.oracle),
        peft.LoraConfig(
            r=32, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
        ),
    )
    named = adapter.disk_tensors(specs, pair.plain, pair.model.family.key_map(pair.model.cfg))
    mine = {name: entry.to_disk(dict(tree.items(params))[entry.path]) for name, entry in named.items()}
    drawn = {k.replace(".default", ""): p for k, p in theirs.named_parameters() if p.requires_grad}
    assert mine.keys() >= {k for k in drawn if "visual" not in k}
    for name, value in mine.items():
        assert value.shape == drawn[name].shape
        if "lora_B" in name:
            assert not value.any()
            continue
        bound = value.shape[1] ** -0.5
        assert 0.95 * bound < value.abs().max() <= bound
        assert value.std() == pytest.approx(drawn[name].std().item(), rel=0.08)
    assert torch.equal(mmfn.logits(replace(pair.model, params=params), pair.batch), mmfn.logits(pair.model, pair.batch))


def test_what_a_rule_updates_is_part_of_an_adapter(pairs: dict[str, Pair]) -> None:
    """As what a gradient trains is; where nothing else of its module changes, peft's format cannot say it."""
    pair = pairs["qwen3_vl"]
    key_map = pair.model.family.key_map(pair.model.cfg)

    def ruled(path: str) -> Any:
        by_rule = {"dtype": torch.float32, "is_frozen": True, "rule": "balance"}
        specs = tree.map_with_path(lambda p, leaf: replace(leaf, **by_rule) if p == path else leaf, pair.plain)
        return lora(specs, **CASES["attention"], keep=[path])

    norm = f"{adapter.PREFIX}model.language_model.norm.weight"
    assert norm in adapter.disk_tensors(ruled("text/norm/weight"), pair.plain, key_map)
    assert adapter.settings(ruled("text/norm/weight"), pair.plain, key_map)["modules_to_save"] == [
        "model.language_model.norm"
    ]
    with pytest.raises(ValueError, match="holds whole modules but 'vision/merger/norm/weight' is not trained"):
        adapter.disk_tensors(ruled("vision/merger/norm/bias"), pair.plain, key_map)


def test_a_leaf_that_is_several_parameters_in_transformers_has_no_adapter(pairs: dict[str, Pair]) -> None:
    pair = pairs["qwen3_vl_moe"]
    key_map = pair.model.family.key_map(pair.model.cfg)
    numbered = Entry(path="text/layers/{i}/moe/experts/down", name="layers.{i}.experts.{e}.down_proj")
    key_map = replace(key_map, layouts={"hub": (), "transformers": (numbered, *key_map.layouts["transformers"])})
    with pytest.raises(ValueError, match=r"moe/experts/down' is several parameters in transformers.* to merged"):
        adapter.settings(lora(pair.plain, **CASES["both experts"]), pair.plain, key_map)


def test_adapters_are_no_part_of_a_checkpoint_until_they_are_merged(pairs: dict[str, Pair], tmp_path: Path) -> None:
    model, _ = pairs["qwen3_vl"].adapted(CASES["attention"])
    with pytest.raises(ValueError, match=r"/lora/.* is in one of them only; pass mmfn.lora.merge\(params\)"):
        mmfn.save_hf(tmp_path / "new", model)
    mmfn.save_hf(tmp_path / "new", replace(model, params=merge(model.params)))


@pytest.fixture
def saved(pairs: dict[str, Pair], tmp_path: Path) -> Path:
    pair = pairs["qwen3_vl"]
    adapter.save(tmp_path / "adapter", *pair.adapted(CASES["attention"]))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "has use_dora True, which mmfn does not have; merge it with peft"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank_pattern"),
        ({"bias": "all"}, "with bias 'all'; only LORA without is read"),
        ({"peft_type": "IA3"}, "is 'IA3'"),
        ({"r": 0}, "has r 0"),
        ({"lora_alpha": "8"}, "lora_alpha '8'"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf; both must be positive numbers"),
        ({"lora_alpha": 10**400}, "lora_alpha 10"),
        ({"lora_alpha": True}, "lora_alpha True"),
        ({"use_rslora": "false"}, "has use_rslora 'false', which must be true or false"),
        ({"init_lora_weights": "pissa"}, "changed its base by init_lora_weights 'pissa'"),
        ({"target_modules": "("}, "is no regular expression"),
        ({"target_modules": 3}, "has target_modules 3, which must be a list of names"),
        ({"lora_dropout": 1.0}, r"has lora_dropout 1.0, which must be in \[0, 1\)"),
        ({"lora_dropout": "a"}, "has lora_dropout 'a'"),
        ({"modules_to_save": "norm"}, "has modules_to_save 'norm', which must be a list of names"),
        ({"target_modules": ["c_attn"]}, "is no layer of this model"),
        ({"target_modules": ["q_proj"]}, "belongs to no parameter"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}, "lacks tensor"),
        ({"r": 4}, r"has shape \[3, 36\] but the config needs \[4, 36\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], message: str, pairs: dict[str, Pair], saved: Path
) -> None:
    config = json.loads((saved / adapter.CONFIG).read_text())
    (saved / adapter.CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        adapter.load(saved, pairs["qwen3_vl"].model)


def test_a_kept_embedding_that_is_the_head_is_refused(pairs: dict[str, Pair], saved: Path, tmp_path: Path) -> None:
    """peft would leave the head on the old matrix: another model than the one trained."""
    tied = mmfn.init(oracles.config(tie_word_embeddings=True).to_dict(), seed=0)
    specs = lora(tied.family.specs(tied.cfg), rank=2, alpha=2.0, targets=LINEAR, keep=(r"text/embed/weight",))
    params = add_adapters(tied.params, specs, seed=1)
    with pytest.raises(ValueError, match=r"'text/embed/weight' is trained in full and tied .*adapter to merged"):
        adapter.save(tmp_path / "new", replace(tied, params=params), specs)
    assert not (tmp_path / "new").exists()
    config = json.loads((saved / adapter.CONFIG).read_text())
    for module in ("embed_tokens", "lm_head"):
        (saved / adapter.CONFIG).write_text(json.dumps(config | {"modules_to_save": [module]}))
        with pytest.raises(ValueError, match=rf"{module}.weight' in full, which is tied to a module that peft leaves"):
            adapter.load(saved, tied)

    pair = pairs["qwen3_vl"]  # whose head is its own
    model, specs = pair.adapted({"targets": LINEAR, "rank": 2, "alpha": 2.0, "keep": (r"text/embed/.*", "head/.*")})
    adapter.save(tmp_path / "new", model, specs)
    torch.testing.assert_close(
        mmfn.logits(adapter.load(tmp_path / "new", pair.model), pair.batch),
        oracles.real_logits(pair.with_peft(tmp_path / "new"), pair.inputs).detach(),
        rtol=RTOL,
        atol=ATOL,
    )


def test_damaged_files_are_refused(pairs: dict[str, Pair], saved: Path) -> None:
    model = pairs["qwen3_vl"].model
    tensors = load_file(saved / adapter.WEIGHTS)
    name = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != name}, saved / adapter.WEIGHTS)
    with pytest.raises(ValueError, match=f"lacks tensor '{name}'"):
        adapter.load(saved, model)
    (saved / adapter.WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged or cut short"):
        adapter.load(saved, model)
    (saved / adapter.CONFIG).unlink()
    with pytest.raises(ValueError, match=r"adapter_config.json does not exist"):
        adapter.load(saved, model)


def test_what_peft_cannot_express_is_refused(pairs: dict[str, Pair], saved: Path, tmp_path: Path) -> None:
    pair = pairs["qwen3_vl"]
    model, specs = pair.adapted({"targets": LINEAR, "rank": 1, "alpha": 1.0, "keep": (r"vision/merger/norm/bias",)})
    with pytest.raises(ValueError, match=r"'vision/merger/norm/weight' is not trained while others of its module are"):
        adapter.save(tmp_path / "new", model, specs)
    assert not (tmp_path / "new").exists()
    once = lora(pair.plain, rank=2, alpha=1, targets=LINEAR[:1])
    twice = lora(once, rank=3, alpha=1, targets=LINEAR[1:], keep=(r".*lora.*",))
    model = replace(pair.model, params=add_adapters(pair.model.params, twice, 0))
    with pytest.raises(ValueError, match="needs adapters of one rank, alpha and dropout"):
        adapter.save(tmp_path / "new", model, twice)
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        adapter.save(saved, *pair.adapted(CASES["attention"]))
