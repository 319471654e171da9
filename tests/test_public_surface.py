"""The public surface, used as its documentation shows it, in processes and against transformers."""

import subprocess
import sys

import pytest
import torch

import mmfn
from tests import oracles

NAMES = {
    "Model",
    "batch_from_hf",
    "generate",
    "init",
    "load_hf",
    "logits",
    "loss",
    "save_hf",
    "to_hf",
    "value_and_grad",
}


def test_every_name_resolves_and_is_listed():
    assert set(mmfn.__all__) == NAMES
    assert set(dir(mmfn)) >= NAMES
    assert all(callable(getattr(mmfn, name)) for name in NAMES)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'mmfn' has no attribute 'loadhf'; it has"):
        mmfn.loadhf  # noqa: B018


def test_importing_does_no_work():
    code = (
        "import sys, mmfn; heavy = {'torch', 'transformers', 'optree', 'msgpack', 'safetensors'} & set(sys.modules); "
        "assert not heavy, heavy; mmfn.value_and_grad; assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["models", "parallel", "train"])
def test_the_short_folder_names_do_not_import(name):
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"import mmfn.{name}" in done.stderr


def test_the_documented_calls_equal_transformers(tmp_path):
    oracle = oracles.build(oracles.config())
    inputs = oracles.inputs(oracle.config, 0, rows=2)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    inputs["labels"][:, :3] = -100
    path = oracles.save(oracle, tmp_path / "a")

    model = mmfn.load_hf(path)
    batch = mmfn.batch_from_hf(inputs, model)
    logits_TV = mmfn.logits(model, batch)
    (loss, metrics), grads = mmfn.value_and_grad(mmfn.loss, has_aux=True)(
        model.params, batch, model, objective="per_token_loss"
    )
    named = mmfn.to_hf(grads, model)
    mmfn.save_hf(tmp_path / "b", model, assets=path)
    ids = mmfn.generate(model, batch, max_new_tokens=3)

    out = oracle(**inputs, use_cache=False)
    out.loss.backward()
    tolerance = {"rtol": oracles.RTOL, "atol": oracles.ATOL}
    torch.testing.assert_close(logits_TV, out.logits[inputs["attention_mask"].bool()].detach(), **tolerance)
    torch.testing.assert_close(loss, out.loss.detach(), **tolerance)
    assert int(metrics["tokens"]) == int((inputs["labels"][:, 1:] != -100).sum())
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(named[name], parameter.grad, **tolerance)
    assert (tmp_path / "b" / "config.json").is_file()
    assert [len(row) for row in ids] == [3, 3]
