"""Reading and writing Hugging Face checkpoints: round trips with transformers, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmfn
from mmfn import tree
from mmfn.interop import adapter, hf
from mmfn.interop.hf import from_hf
from mmfn.lora import add_adapters, lora
from mmfn.models import family
from tests import oracles

EMBED = "model.language_model.embed_tokens.weight"
NORM = "model.language_model.norm.weight"


@pytest.fixture(scope="module")
def oracle():
    return oracles.build(oracles.config())


@pytest.fixture
def folder(oracle, tmp_path):
    """A checkpoint as transformers writes it, in one file."""
    return oracles.save(oracle, tmp_path / "hub")


@pytest.fixture
def sharded(oracle, tmp_path):
    """The same checkpoint in several files."""
    return oracles.save(oracle, tmp_path / "shards", max_shard_size="20KB")


@pytest.fixture
def rewrite(folder):
    """Change the tensors of the checkpoint in place."""

    def change(edit):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return change


def assert_params_equal(a, b):
    assert tree.paths(a) == tree.paths(b)
    assert [x.dtype for x in tree.leaves(a)] == [y.dtype for y in tree.leaves(b)]
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 15_000])
def test_what_is_written_loads_in_transformers(is_tied, max_shard_bytes, tmp_path):
    cfg = oracles.config(tie_word_embeddings=is_tied)
    oracle = oracles.build(cfg, 3)
    model = mmfn.load_hf(oracles.save(oracle, tmp_path / "a"))
    mmfn.save_hf(tmp_path / "b", model, max_shard_bytes=max_shard_bytes)
    files = sorted(p.name for p in (tmp_path / "b").glob("*.safetensors"))
    assert files == ["model.safetensors"] if max_shard_bytes > 15_000 else len(files) > 3
    back, info = oracles.oracle_class(cfg).from_pretrained(
        tmp_path / "b", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert back.dtype == torch.float32
    batch = oracles.inputs(cfg, 0)
    assert torch.equal(oracles.real_logits(back, batch), oracles.real_logits(oracle, batch))
    assert_params_equal(mmfn.load_hf(tmp_path / "b").params, model.params)


def test_shards_of_transformers_load(oracle, folder, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert_params_equal(mmfn.load_hf(sharded).params, mmfn.load_hf(folder).params)


def test_names_are_those_of_transformers(oracle, folder):
    model = mmfn.load_hf(folder)
    named = mmfn.to_hf(model.params, model)
    assert named.keys() == dict(oracle.named_parameters()).keys()
    assert all(torch.equal(named[name], p) for name, p in oracle.named_parameters())
    assert_params_equal(from_hf(named, model), model.params)


def test_dtype_is_as_stored_or_as_asked(oracle, tmp_path):
    import copy

    folder = oracles.save(copy.deepcopy(oracle).bfloat16(), tmp_path / "bf16")
    assert {p.dtype for p in tree.leaves(mmfn.load_hf(folder).params)} == {torch.bfloat16}
    assert {p.dtype for p in tree.leaves(mmfn.load_hf(folder, dtype=torch.float64).params)} == {torch.float64}
    mmfn.save_hf(tmp_path / "again", mmfn.load_hf(folder))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    assert type(oracle).from_pretrained(tmp_path / "again").dtype == torch.bfloat16


def test_the_dtype_is_said_in_every_section_that_has_one(folder, tmp_path):
    model = mmfn.load_hf(folder, dtype=torch.bfloat16)
    inner = {"text_config": {"torch_dtype": "float16"}, "audio_config": {"depth": 2}, "decoder": {"dtype": "float16"}}
    more = {"thinker_config": {**inner, "limits": {"frames": {"most": 3}}}}
    mmfn.save_hf(tmp_path / "out", replace(model, hf_config={**model.hf_config, **more}))
    config, said = json.loads((tmp_path / "out" / "config.json").read_text()), {"dtype": "bfloat16"}
    assert config["thinker_config"] == {
        "text_config": said,
        "audio_config": {"depth": 2, **said},
        "decoder": said,
        "limits": {"frames": {"most": 3}},
        **said,
    }
    assert config["dtype"] == config["text_config"]["dtype"] == config["vision_config"]["dtype"] == "bfloat16"
    assert "dtype" not in config["text_config"]["rope_parameters"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, "bfloat16"])
def test_dtypes_that_are_not_floating_are_refused(dtype, folder):
    with pytest.raises(ValueError, match=rf"dtype is '?{dtype}'? but must be a floating torch.dtype of 16 bits"):
        mmfn.load_hf(folder, dtype=dtype)
    with pytest.raises(ValueError, match=r"but must be a floating torch.dtype of"):
        mmfn.init(oracles.config().to_dict(), dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", 1.5])
def test_devices_that_are_not_there_are_refused(device, folder):
    with pytest.raises(ValueError, match=r"device .* cannot be used by this torch .*; try 'cpu'"):
        mmfn.load_hf(folder, device=device)


def test_parameters_do_not_alias_the_file(folder):
    model = mmfn.load_hf(folder)
    before = (folder / "model.safetensors").read_bytes()
    for leaf in tree.leaves(model.params):
        leaf.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert any(leaf.any() for leaf in tree.leaves(mmfn.load_hf(folder).params))


def test_a_stored_copy_of_a_tied_head_must_be_equal(rewrite):
    folder = rewrite(lambda t: t.update({"lm_head.weight": t[EMBED].clone()}))
    assert "head" not in mmfn.load_hf(folder).params
    rewrite(lambda t: t.update({"lm_head.weight": t[EMBED] + 1}))
    with pytest.raises(ValueError, match=r"'lm_head.weight' in model.safetensors differs from .*tie_word_embeddings"):
        mmfn.load_hf(folder)


BUFFER = "model.language_model.rotary_emb.inv_freq"


def test_buffers_that_transformers_computes_are_ignored(oracle, rewrite):
    """As in checkpoints of its early releases; the library loads them too."""
    folder = rewrite(lambda t: t.update({BUFFER: torch.ones(4), "model.visual.rotary_pos_emb.inv_freq": torch.ones(2)}))
    assert BUFFER not in mmfn.to_hf(mmfn.load_hf(folder).params, mmfn.load_hf(folder))
    _, info = type(oracle).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    rewrite(lambda t: t.update({"model.language_model.inv_freqs": torch.ones(4)}))
    with pytest.raises(ValueError, match=r"'model.language_model.inv_freqs' in .* belongs to no parameter"):
        mmfn.load_hf(folder)


@pytest.mark.parametrize("name", [BUFFER, "lm_head.weight"])
def test_an_index_may_list_or_lack_what_is_not_needed(name, oracle, folder, sharded):
    """A tied head or a buffer that was dropped from a file but not from the index, or the other way round."""
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    file = value["weight_map"][EMBED]
    index.write_text(json.dumps({"weight_map": {**value["weight_map"], name: file}}))
    assert_params_equal(mmfn.load_hf(sharded).params, mmfn.load_hf(folder).params)
    tensors = load_file(sharded / file)
    extra = {name: tensors[EMBED].clone()}
    save_file(tensors | extra, sharded / file, metadata={"format": "pt"})
    index.write_text(json.dumps(value))
    assert_params_equal(mmfn.load_hf(sharded).params, mmfn.load_hf(folder).params)
    back, info = type(oracle).from_pretrained(sharded, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(back.get_parameter(EMBED), oracle.get_parameter(EMBED))
    if name != BUFFER:  # a tied head that is there must still be equal
        save_file(tensors | {name: extra[name] + 1}, sharded / file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"'{name}' in {file} differs from"):
            mmfn.load_hf(sharded)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(NORM), rf"lacks tensor '{NORM}' for parameter text/norm/weight"),
        (lambda t: t.update({NORM + "x": t.pop(NORM)}), rf"lacks tensor '{NORM}' .*nearest is '{NORM}x'"),
        (lambda t: t.update({NORM + "x": torch.zeros(2)}), rf"'{NORM}x' in model.safetensors .*nearest is '{NORM}'"),
        (lambda t: t.update({NORM: torch.zeros(35)}), rf"'{NORM}' in model.safetensors .*\[35\] but .* needs \[36\]"),
        (lambda t: t.update({NORM: t[NORM].to(torch.int8)}), rf"'{NORM}' in model.safetensors .*dtype I8 but a float"),
        (lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}), "dtype F8_E4M3 but a float tensor is needed"),
    ],
)
def test_what_does_not_fit_is_refused(edit, message, rewrite):
    folder = rewrite(edit)
    with pytest.raises(ValueError, match=message) as caught:
        mmfn.load_hf(folder)
    assert "\n" not in str(caught.value)


def test_several_misfits_are_counted(rewrite):
    with pytest.raises(ValueError, match=r"\(and 1 more\)"):
        mmfn.load_hf(rewrite(lambda t: (t.pop(NORM), t.pop(EMBED))))


def test_a_truncated_file_is_named(folder, sharded):
    for path in (folder / "model.safetensors", sorted(sharded.glob("*.safetensors"))[2]):
        data = path.read_bytes()
        for keep in (len(data) - 10, 100, 4, 0):
            path.write_bytes(data[:keep])
            with pytest.raises(ValueError, match=f"weight file .*{path.name} is damaged or cut short"):
                mmfn.load_hf(path.parent)


def test_a_missing_shard_is_named(sharded):
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} is missing but model.safetensors.index.json lists it"):
        mmfn.load_hf(sharded)


def test_an_index_that_is_wrong_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    files = sorted(set(value["weight_map"].values()))

    def write(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))

    write({**value["weight_map"], "extra.weight": files[0]})
    with pytest.raises(ValueError, match=f"{files[0]} lacks tensor 'extra.weight'"):
        mmfn.load_hf(sharded)
    write({**value["weight_map"], EMBED: "../elsewhere.safetensors"})
    with pytest.raises(ValueError, match="a safetensors file beside it is expected"):
        mmfn.load_hf(sharded)
    (sharded / "twice.safetensors").write_bytes((sharded / files[0]).read_bytes())
    with_copy = {name: file for name, file in value["weight_map"].items() if file == files[0]}
    write({**value["weight_map"], next(iter(with_copy)): "twice.safetensors"})
    with pytest.raises(
        ValueError, match=r"twice.safetensors holds tensor .* that model.safetensors.index.json does not list"
    ):
        mmfn.load_hf(sharded)
    for file in ("", "..", "."):
        write({**value["weight_map"], EMBED: file})
        with pytest.raises(ValueError, match=f"into '{file}'; a safetensors file beside it is expected"):
            mmfn.load_hf(sharded)
    omitted = next(iter(with_copy))  # not alone in its file
    write({name: file for name, file in value["weight_map"].items() if name != omitted})
    with pytest.raises(ValueError, match=f"holds tensor '{omitted}' that model.safetensors.index.json does not list"):
        mmfn.load_hf(sharded)
    write({})
    with pytest.raises(ValueError, match="has no weight_map"):
        mmfn.load_hf(sharded)
    index.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"index.json is not readable JSON \(maximum recursion depth"):
        mmfn.load_hf(sharded)


def test_folders_without_weights_or_config_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        mmfn.load_hf(tmp_path / "nowhere")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled"):
        mmfn.load_hf(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="holds neither model"):
        mmfn.load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        mmfn.load_hf(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list but must hold a JSON object"):
        mmfn.load_hf(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json does not exist"):
        mmfn.load_hf(folder)


def test_assets_are_copied_and_weights_are_not(folder, tmp_path):
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json", "merges.txt"]
    for name in [*names, "generation_config.json", "README.md", "optimizer.pt"]:
        (folder / name).write_text(name)
    model = mmfn.load_hf(folder)
    mmfn.save_hf(tmp_path / "out", model, assets=folder)
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written == {*names, "generation_config.json", "config.json", "model.safetensors"}
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges.txt"
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    assert modes == {(folder / "README.md").stat().st_mode & 0o777}  # readable as any new file is


def test_saving_refuses_bad_arguments(folder, tmp_path):
    model = mmfn.load_hf(folder)
    with pytest.raises(ValueError, match="max_shard_bytes is 0 but must be positive"):
        mmfn.save_hf(tmp_path / "out", model, max_shard_bytes=0)
    with pytest.raises(ValueError, match="is not a folder; pass the folder that holds the tokenizer"):
        mmfn.save_hf(tmp_path / "out", model, assets=tmp_path / "none")
    (tmp_path / "file").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"file exists and is not an empty folder|file is no checkpoint"):
            mmfn.save_hf(tmp_path / "file", model, overwrite=overwrite)
    assert not (tmp_path / "out").exists()


def test_trees_of_another_shape_are_refused(folder):
    model = mmfn.load_hf(folder)
    with pytest.raises(ValueError, match="'text/embed/weight' is in one of them only"):
        mmfn.to_hf({"vision": model.params["vision"]}, model)
    with pytest.raises(ValueError, match=r"leaf 'text/embed/weight' has shape \[0, 36\] but the parameter has"):
        mmfn.to_hf(tree.map(lambda p: p[:0], model.params), model)
    named = mmfn.to_hf(model.params, model)
    named.pop(NORM)
    with pytest.raises(ValueError, match=f"the mapping lacks tensor '{NORM}'"):
        from_hf(named, model)


@pytest.fixture
def declare(monkeypatch):
    """The family with the text's last norm declared float32."""

    def declared_specs(cfg):
        specs = family("qwen3_vl").specs(cfg)
        norm = {"weight": replace(specs["text"]["norm"]["weight"], dtype=torch.float32)}
        return {**specs, "text": {**specs["text"], "norm": norm}}

    declaring = replace(family("qwen3_vl"), specs=declared_specs)
    monkeypatch.setattr(hf, "family", lambda name: declaring)


def test_a_declared_dtype_survives_init_load_save_and_adapters(declare, oracle, tmp_path):
    """Values that bfloat16 cannot hold, in a model of bfloat16."""
    folder = oracles.save(oracle, tmp_path / "source")
    norm = oracle.get_parameter(NORM)
    assert not torch.equal(norm.bfloat16().float(), norm)
    model = mmfn.load_hf(folder, dtype=torch.bfloat16)
    drawn = mmfn.init(oracle.config.to_dict(), dtype=torch.bfloat16)
    for params in (model.params, drawn.params):
        dtypes = {path: leaf.dtype for path, leaf in tree.items(params)}
        assert [path for path, dtype in dtypes.items() if dtype == torch.float32] == ["text/norm/weight"]
        assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    assert torch.equal(model.params["text"]["norm"]["weight"], norm)

    mmfn.save_hf(tmp_path / "out", model)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name, value in written.items() if value.dtype == torch.float32} == {NORM}
    assert torch.equal(written[NORM], norm)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_params_equal(mmfn.load_hf(tmp_path / "out", dtype=torch.bfloat16).params, model.params)

    narrow = tree.map(lambda leaf: leaf.bfloat16(), model.params)  # what was cast on the way is written as declared
    mmfn.save_hf(tmp_path / "cast", replace(model, params=narrow))
    assert load_file(tmp_path / "cast" / "model.safetensors")[NORM].dtype == torch.float32
    assert torch.equal(mmfn.load_hf(tmp_path / "cast").params["text"]["norm"]["weight"], norm.bfloat16().float())

    specs = lora(model.family.specs(model.cfg), rank=2, alpha=4.0, targets=[r"text/layers/\d+/attention/q"])
    adapted = add_adapters(model.params, specs, 0)
    assert {leaf.dtype for path, leaf in tree.items(adapted) if "/lora/" in path} == {torch.bfloat16}
    assert adapted["text"]["norm"]["weight"].dtype == torch.float32

    specs = lora(
        model.family.specs(model.cfg),
        rank=2,
        alpha=4.0,
        targets=[r"text/layers/\d+/attention/q"],
        keep=["text/norm/weight"],
    )
    adapter.save(tmp_path / "adapter", replace(model, params=adapted), specs)
    assert_params_equal(adapter.load(tmp_path / "adapter", model).params, adapted)
