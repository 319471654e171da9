"""Models as modules and modules as functions."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import mmfn
from mmfn import tree
from mmfn.interop.module import as_module, functional
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
