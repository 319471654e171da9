"""Models as modules and modules as functions."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import mmfn
from mmfn import rng, tree
from mmfn.interop.module import as_module, functional
from mmfn.lora import add_adapters, lora, merge
from tests import oracles


@pytest.fixture
def model():
    return mmfn.init(oracles.config(tie_word_embeddings=False).to_dict())


@pytest.fixture
def batch(model):
    inputs = oracles.inputs(oracles.config(), 1, rows=2)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return mmfn.batch_from_hf(inputs | {"labels": labels}, model)


def test_parameters_are_registered_under_their_paths(model):
    module = as_module(model)
    named = dict(module.named_parameters())
    assert set(named) == {path.replace("/", ".") for path in tree.paths(model.params)}
    assert tree.paths(module.params) == tree.paths(model.params)
    assert all(a is named[p.replace("/", ".")] for p, a in tree.items(module.params))
    assert all(
        a.data_ptr() == b.data_ptr() for a, b in zip(tree.leaves(module.params), tree.leaves(model.params), strict=True)
    )
    assert isinstance(model.params, dict)


def test_forward_is_logits_or_loss_and_gradients_flow(model, batch):
    module = as_module(model)
    assert torch.equal(module(batch), mmfn.logits(model, batch))
    loss, metrics = module(batch, objective="per_token_loss")
    loss.backward()
    (want, want_metrics), grads = mmfn.value_and_grad(mmfn.loss, has_aux=True)(
        model.params, batch, model, objective="per_token_loss"
    )
    assert torch.equal(loss, want)
    assert metrics["tokens"] == want_metrics["tokens"]
    got = tree.map(lambda p: p.grad, module.params)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(got), tree.leaves(grads), strict=True))


def test_a_tree_of_any_nesting_becomes_a_module_and_back(model):
    params = {"scale": torch.ones(2), "layers": [{"w": torch.zeros(1)}, torch.ones(3)] + [{}] * 10, "none": []}
    module = as_module(replace(model, params=params))
    assert tree.paths(module.params) == tree.paths(params)
    assert torch.equal(module.params["layers"][1], params["layers"][1])
    assert (len(module.params["layers"]), module.params["none"]) == (12, [])


@pytest.fixture
def adapted(model):
    """With adapters that compute something: `b` is drawn too."""
    specs = lora(
        model.family.specs(model.cfg), rank=2, alpha=4.0, targets=[r"text/layers/\d+/attention/q", r"vision/.*/qkv"]
    )
    params = add_adapters(model.params, specs, 0)
    drawn = rng.generator(0, "b")
    return replace(
        model,
        params=tree.map_with_path(
            lambda path, leaf: torch.randn(leaf.shape, generator=drawn) / 9 if path.endswith("/b") else leaf, params
        ),
    )


def test_a_model_with_adapters(model, adapted, batch):
    module = as_module(adapted)
    named = dict(module.named_parameters())
    assert set(named) == {path.replace("/", ".") for path in tree.paths(adapted.params)}
    assert "text.layers.0.attention.q.lora.weight.a" in named
    assert tree.flatten(module.params)[1] == tree.flatten(adapted.params)[1]  # alpha, rank and kind of node too
    logits_TV = module(batch)
    assert torch.equal(logits_TV, mmfn.logits(adapted, batch))
    assert not torch.equal(logits_TV, mmfn.logits(model, batch))
    assert_close(logits_TV, mmfn.logits(replace(model, params=merge(adapted.params)), batch), rtol=1e-4, atol=1e-5)
    loss, _ = module(batch, objective="default")
    loss.backward()
    (want, _), grads = mmfn.value_and_grad(mmfn.loss, has_aux=True)(adapted.params, batch, adapted)
    assert torch.equal(loss, want)
    for (path, gradient), parameter in zip(tree.items(grads), tree.leaves(module.params), strict=True):
        assert torch.equal(parameter.grad, gradient), path
    assert all(named[f"vision.layers.0.attention.qkv.lora.weight.{side}"].grad.any() for side in "ab")


def test_a_module_with_adapters_is_copied_and_its_state_goes_back_in(adapted, batch):
    module = as_module(adapted)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.text.layers[0].attention.q.lora.weight.b.zero_()
    assert not torch.equal(twin(batch), module(batch))
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(batch), module(batch))
    twin.double()
    assert {leaf.dtype for leaf in tree.leaves(twin.params)} == {torch.float64}


def test_a_torch_optimizer_can_step_it(model, batch):
    own = replace(model, params=tree.map(torch.clone, model.params))
    module = as_module(own)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss, _ = module(batch, objective="default")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert torch.equal(own.params["head"]["weight"], module.head.weight)


def test_its_state_dict_goes_back_in(model, batch):
    module = as_module(model)
    other = as_module(mmfn.init(model.hf_config, seed=5))
    assert not torch.equal(other(batch), module(batch))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(batch), module(batch))


def test_a_module_as_a_pure_function():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1))
    fn, params = functional(module)
    x = torch.randn(5, 3)
    assert torch.equal(fn(params, x), module(x))
    shifted = {name: value + 1 for name, value in params.items()}
    assert not torch.equal(fn(shifted, x), module(x))
    _, grads = mmfn.value_and_grad(lambda p: fn(p, x).square().sum())(params)
    module(x).square().sum().backward()
    assert all(torch.equal(grads[name], p.grad) for name, p in module.named_parameters())
    assert all(not value.requires_grad for value in params.values())


def test_a_model_of_transformers_as_a_pure_function():
    oracle = oracles.build(oracles.config())
    fn, params = functional(oracle)
    inputs = oracles.inputs(oracles.config(), 1)
    assert EMBED in params
    assert "lm_head.weight" not in params  # tied: once
    assert torch.equal(fn(params, **inputs, use_cache=False).logits, oracle(**inputs, use_cache=False).logits)
    silent = fn(params | {EMBED: torch.zeros_like(params[EMBED])}, **inputs, use_cache=False)
    assert not silent.logits.any()


EMBED = "model.language_model.embed_tokens.weight"
