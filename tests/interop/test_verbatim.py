"""What a checkpoint holds beside the parameters: ignored, or carried byte for byte into what is saved."""

import json
import struct
import tracemalloc
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmfn
from mmfn import tree
from mmfn.interop import hf
from mmfn.lora import add_adapters, lora, merge
from mmfn.models import family
from tests import oracles

BESIDE = {
    "mtp.norm.weight": torch.randn(5).to(torch.float8_e4m3fn),  # an odd number of bytes in front of wider ones
    "mtp.fc.weight": torch.randn(7, 3, dtype=torch.float64),
    "mtp.step": torch.tensor(3),
    "talker.layers.0.weight": torch.randn(4, 9).bfloat16(),
    "talker.empty": torch.empty(0, 4),
}
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4, "F64": 8, "I64": 8}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def oracle():
    return oracles.build(oracles.config())


@pytest.fixture(autouse=True)
def declare(monkeypatch):
    """The family with names that are passed on."""
    plain = family("qwen3_vl")
    declaring = replace(
        plain,
        key_map=lambda cfg: replace(plain.key_map(cfg), verbatim=(r"mtp\..*", r"talker\.layers\..*", r"talker\.\w+")),
    )
    monkeypatch.setattr(hf, "family", lambda name: declaring)


@pytest.fixture
def source(oracle, tmp_path):
    """A checkpoint in shards with more in it than the model has."""
    folder = oracles.save(oracle, tmp_path / "source", max_shard_size="40KB")
    index = json.loads((folder / INDEX).read_text())
    for file, names in (("a.safetensors", list(BESIDE)[:3]), ("b.safetensors", list(BESIDE)[3:])):
        save_file({name: BESIDE[name] for name in names}, folder / file)
        index["weight_map"] |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def raw(folder):
    """`{name: (dtype, shape, bytes)}` of all tensors, by the format's own description."""
    out = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        assert (8 + length) % 8 == 0
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                assert name not in out
                assert start % BYTES[entry["dtype"]] == 0  # aligned
                out[name] = entry["dtype"], entry["shape"], data[8 + length + start : 8 + length + stop]
    return out


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 15_000, 100])
def test_they_are_copied_byte_for_byte(max_shard_bytes, source, tmp_path):
    model = mmfn.load_hf(source)
    assert set(model.verbatim) == set(BESIDE)
    assert not [path for path in tree.paths(model.params) if "mtp" in path]
    changed = replace(model, params=tree.map(lambda p: p + 1, model.params))
    mmfn.save_hf(tmp_path / "out", changed, assets=source, max_shard_bytes=max_shard_bytes)
    before, after = raw(source), raw(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name: after[name] for name in BESIDE} == {name: before[name] for name in BESIDE}
    assert {code for code, _, _ in (after[name] for name in BESIDE)} == {"F8_E4M3", "F64", "I64", "BF16", "F32"}
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"].keys() == before.keys()
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in after.values())
    for file in set(index["weight_map"].values()):
        loaded = load_file(tmp_path / "out" / file)
        assert loaded.keys() == {name for name, value in index["weight_map"].items() if value == file}
        assert all(torch.equal(loaded[n].double(), BESIDE[n].double()) for n in loaded.keys() & BESIDE.keys())
    again = mmfn.load_hf(tmp_path / "out")
    assert set(again.verbatim) == set(BESIDE)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(again.params), tree.leaves(changed.params), strict=True))
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {(source / INDEX).stat().st_mode & 0o777}


def test_transformers_loads_the_result(oracle, source, tmp_path):
    mmfn.save_hf(tmp_path / "out", mmfn.load_hf(source), assets=source)
    back, info = type(oracle).from_pretrained(tmp_path / "out", output_loading_info=True, attn_implementation="eager")
    assert set(info["unexpected_keys"]) == set(BESIDE)
    assert not info["missing_keys"]
    inputs = oracles.inputs(oracle.config, 0)
    assert torch.equal(oracles.real_logits(back, inputs), oracles.real_logits(oracle, inputs))


def test_a_checkpoint_over_itself_and_with_adapters_merged(source):
    model, before = mmfn.load_hf(source), raw(source)
    specs = lora(model.family.specs(model.cfg), rank=2, alpha=4.0, targets=[r"text/layers/\d+/attention/q"])
    adapted = replace(model, params=add_adapters(model.params, specs, 0))
    mmfn.save_hf(source, replace(adapted, params=merge(adapted.params)), assets=source, overwrite=True)
    assert raw(source) == before


def test_without_their_source_nothing_is_written(oracle, source, tmp_path):
    model, fix = mmfn.load_hf(source), "pass assets=the folder that the model was loaded from"
    with pytest.raises(ValueError, match=rf"checkpoint holds 'mtp.fc.weight' \(and 4 more\) .*no folder.*; {fix}"):
        mmfn.save_hf(tmp_path / "out", model)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ValueError, match=rf"no weights to copy 'mtp.fc.weight' from .*holds neither model.*; {fix}"):
        mmfn.save_hf(tmp_path / "out", model, assets=tmp_path / "tokenizer")
    plain = oracles.save(oracle, tmp_path / "plain")
    with pytest.raises(ValueError, match=rf"plain lack tensor 'mtp.fc.weight' \(and 4 more\) of the model's .*; {fix}"):
        mmfn.save_hf(tmp_path / "out", model, assets=plain)
    assert not (tmp_path / "out").exists()


def test_a_model_whose_checkpoint_has_none_needs_no_source(oracle, tmp_path):
    for model in (mmfn.load_hf(oracles.save(oracle, tmp_path / "plain")), mmfn.init(oracle.config.to_dict())):
        assert model.verbatim == ()
        mmfn.save_hf(tmp_path / "out", model, overwrite=True)
        assert not (tmp_path / "out" / INDEX).exists()


def test_a_large_part_passes_through_little_memory(source, tmp_path):
    save_file(
        {"talker.layers.0.weight": torch.ones(5_000_000), "talker.empty": BESIDE["talker.empty"]},
        source / "b.safetensors",
    )
    model = mmfn.load_hf(source)
    tracemalloc.start()
    mmfn.save_hf(tmp_path / "out", model, assets=source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 18_000_000  # two pieces of 8 MiB, of 20 MB
    assert raw(tmp_path / "out")["talker.layers.0.weight"] == raw(source)["talker.layers.0.weight"]


def test_a_source_that_is_cut_short_meanwhile_is_an_error(source, tmp_path, monkeypatch):
    from mmfn.interop import verbatim

    model, find = mmfn.load_hf(source), verbatim.find

    def find_and_cut(folder, names):
        spans = find(folder, names)
        (folder / "a.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:-4])
        return spans

    monkeypatch.setattr(verbatim, "find", find_and_cut)
    with pytest.raises(OSError, match=r"a.safetensors ends \d bytes early; it changed while it was copied"):
        mmfn.save_hf(tmp_path / "out", model, assets=source)
    assert not (tmp_path / "out").exists()
