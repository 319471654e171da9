"""Layouts of experts on disk: all are read, none is guessed from a square shape, all are written."""

import itertools
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmfn
from mmfn import tree
from mmfn.interop import hf
from mmfn.interop.hf import from_hf
from mmfn.models import family
from mmfn.models.keymap import Entry
from tests import oracles

LAYER = "model.language_model.layers.{}.mlp.experts.{}_proj"
# Width of an expert for the model's width of 36: 2 * 18 makes gate_up square, 36 makes down square.
WIDTHS = {"oblong": 22, "square gate_up": 18, "square down": 36}


def build(width):
    return oracles.build(oracles.config(family="qwen3_vl_moe", text={"moe_intermediate_size": width}), width)


@pytest.fixture(scope="module", params=WIDTHS)
def case(request):
    return request.param, build(WIDTHS[request.param])


def turn(folder, names=None):
    """Transpose experts of the checkpoint in place (all of them, or those named), from one layout into the other."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in names or [n for n in tensors if ".experts." in n]:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def experts_of(folder):
    return {n: t for n, t in load_file(folder / "model.safetensors").items() if ".experts." in n}


def assert_same(params, model):
    assert tree.paths(params) == tree.paths(model.params)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(params), tree.leaves(model.params), strict=True))


def test_both_layouts_load_to_the_same_parameters(case, tmp_path):
    _, oracle = case
    held = mmfn.load_hf(oracles.save(oracle, tmp_path / "held"))
    hub = mmfn.load_hf(turn(oracles.save(oracle, tmp_path / "hub")))
    assert_same(hub.params, held)
    block, own = oracle.model.language_model.layers[1].mlp.experts, hub.params["text"]["layers"][1]["moe"]["experts"]
    assert torch.equal(own["gate_up"], block.gate_up_proj)
    assert torch.equal(own["down"], block.down_proj)
    assert all(leaf.is_contiguous() for leaf in tree.leaves(hub.params))


def test_both_layouts_are_written(case, tmp_path):
    name, oracle = case
    model = mmfn.load_hf(oracles.save(oracle, tmp_path / "source"))
    mmfn.save_hf(tmp_path / "held", model, layout="transformers")
    for key, tensor in experts_of(tmp_path / "held").items():
        assert torch.equal(tensor, oracle.get_parameter(key))
    written = ["held"]
    if name == "oblong":
        mmfn.save_hf(tmp_path / "hub", model)
        for key, tensor in experts_of(tmp_path / "hub").items():
            assert torch.equal(tensor.transpose(1, 2), oracle.get_parameter(key))
        written.append("hub")
    inputs = oracles.inputs(oracle.config, 0)
    for folder in written:
        assert_same(mmfn.load_hf(tmp_path / folder).params, model)
        back, info = type(oracle).from_pretrained(
            tmp_path / folder, output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(oracles.real_logits(back, inputs), oracles.real_logits(oracle, inputs))


@pytest.mark.parametrize(
    ("case", "tensor"), [("square gate_up", "gate_up"), ("square down", "down")], indirect=["case"]
)
def test_what_transformers_would_misread_is_not_written(case, tensor, tmp_path):
    """It would: the file of the hub's layout loads there without a word, and differs."""
    _, oracle = case
    model = mmfn.load_hf(oracles.save(oracle, tmp_path / "source"))
    message = rf"'{re.escape(LAYER.format(0, tensor))}' has shape .* in every layout.*layout='transformers'"
    with pytest.raises(ValueError, match=message) as caught:
        mmfn.save_hf(tmp_path / "out", model)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    misread = type(oracle).from_pretrained(turn(tmp_path / "source"))
    assert not torch.equal(
        misread.get_parameter(LAYER.format(0, tensor)), oracle.get_parameter(LAYER.format(0, tensor))
    )


@pytest.mark.parametrize(
    "names",
    [
        [LAYER.format(0, "gate_up")],
        [LAYER.format(1, "down")],
        [LAYER.format(0, "gate_up"), LAYER.format(0, "down")],  # one layer unlike the other
    ],
)
def test_mixed_layouts_are_refused(names, tmp_path):
    folder = turn(oracles.save(build(22), tmp_path / "mixed"), names)
    message = r"tensor '.*experts.*' in model.safetensors of .* the layout of '.*', but other tensors have that of '"
    with pytest.raises(ValueError, match=message) as caught:
        mmfn.load_hf(folder)
    assert "\n" not in str(caught.value)


def test_other_shapes_are_refused_as_ever(tmp_path):
    folder = oracles.save(build(22), tmp_path / "odd")
    name = LAYER.format(0, "down")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.zeros(6, 36, 21)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"'{re.escape(name)}' in .* has shape \[6, 36, 21\] but the config needs"):
        mmfn.load_hf(folder)
    tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"lacks tensor '{re.escape(name)}' for parameter text/layers/0/moe/experts/down"
    ):
        mmfn.load_hf(folder)


def test_a_wrong_config_is_told_by_shapes(tmp_path):
    folder = oracles.save(build(22), tmp_path / "wrong")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["moe_intermediate_size"] = 11
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"experts.* has shape .* but the config needs .*config and weights must belong"
    ):
        mmfn.load_hf(folder)


@pytest.mark.parametrize("layout", ["hub", "transformers"])
def test_named_trees_are_views_in_either_layout(case, layout, tmp_path):
    _, oracle = case
    model = mmfn.load_hf(oracles.save(oracle, tmp_path))
    named = mmfn.to_hf(model.params, model, layout)
    addresses = {leaf.data_ptr() for leaf in tree.leaves(model.params)}
    assert {value.data_ptr() for value in named.values()} == addresses
    assert_same(from_hf(named, model), model)
    with pytest.raises(ValueError, match="layout 'disk' is unknown; use one of hub, transformers"):
        mmfn.to_hf(model.params, model, "disk")


@pytest.fixture
def number(monkeypatch):
    """The family with a third layout, a matrix per expert, by its key map alone."""
    plain = family("qwen3_vl_moe")
    at = "model.language_model.layers.{i}.mlp.experts.{e}."
    entries = (
        Entry(
            path="text/layers/{i}/moe/experts/gate_up", name=(at + "gate_proj.weight", at + "up_proj.weight"), join=1
        ),
        Entry(path="text/layers/{i}/moe/experts/down", name=at + "down_proj.weight"),
    )

    def key_map(cfg):
        stored = plain.key_map(cfg)
        return replace(stored, layouts={**stored.layouts, "numbered": entries})

    numbered = replace(plain, key_map=key_map)
    monkeypatch.setattr(hf, "family", lambda name: numbered)


def test_a_tensor_per_expert_is_one_more_layout(case, number, tmp_path):
    _, oracle = case
    folder = oracles.save(oracle, tmp_path / "source")
    model = mmfn.load_hf(folder)
    split = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".experts." not in n}
    for i, layer in enumerate(oracle.model.language_model.layers):
        for e, (gate_up, down) in enumerate(
            zip(layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, strict=True)
        ):
            for name, value in (*zip(("gate", "up"), gate_up.chunk(2), strict=True), ("down", down)):
                split[f"model.language_model.layers.{i}.mlp.experts.{e}.{name}_proj.weight"] = value.detach().clone()
    save_file(split, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(mmfn.load_hf(folder).params, model)
    for shard_bytes in (5_000_000_000, 20_000):
        mmfn.save_hf(tmp_path / "out", model, max_shard_bytes=shard_bytes, layout="numbered", overwrite=True)
        written = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
        assert written.keys() == split.keys()
        assert all(torch.equal(written[name], split[name]) for name in split)
        assert_same(mmfn.load_hf(tmp_path / "out").params, model)


def test_a_tensor_per_expert_is_copied_once(number, tmp_path):
    mmfn.save_hf(tmp_path / "out", mmfn.load_hf(oracles.save(build(22), tmp_path / "source")), layout="numbered")
    assert_loads_in_one_copy(tmp_path / "out")


def test_a_transposed_tensor_is_copied_once(tmp_path):
    assert_loads_in_one_copy(turn(oracles.save(build(22), tmp_path)))


def assert_loads_in_one_copy(folder):
    """Beside the mapped file, which the profiler counts, loading never holds more than the parameters."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model = mmfn.load_hf(folder)
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())))
    size = sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(model.params))
    mapped = (folder / "model.safetensors").stat().st_size
    assert size <= max(held) <= size + mapped
