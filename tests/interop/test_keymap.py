"""Names of parameters: every family's map against the names transformers uses."""

import pytest
import torch
from safetensors.torch import load_file

from mmfn.models import family
from mmfn.models.keymap import Entry, KeyMap
from mmfn.spec import ONES, spec
from tests import oracles


def _fused(shapes):
    """Tensors that hold all experts of a layer; other types store every expert by itself."""
    return [(n, s) for n, s in shapes.items() if ".experts." in n and len(s) == 3]


@pytest.mark.parametrize("name", oracles.TYPES)
@pytest.mark.parametrize("is_tied", [True, False])
def test_names_and_shapes_equal_transformers(name, is_tied, tmp_path):
    cfg = oracles.config(family=name, tie_word_embeddings=is_tied, text={"attention_bias": True})
    model, oracle = family(name), oracles.build(cfg)
    own = model.config_from_hf(oracles.to_dict(cfg))
    specs, key_map = model.specs(own), model.key_map(own)
    tied = {"lm_head.weight"} if is_tied else set()
    want = {n: tuple(value.shape) for n, value in oracle.state_dict().items() if n not in tied}
    stored = key_map.disk_tensors(specs, "transformers")
    assert {n.removeprefix("thinker."): s.shape for n, s in stored.items()} == want
    disk = {n: tuple(v.shape) for n, v in load_file(oracles.save(oracle, tmp_path) / "model.safetensors").items()}
    turned = {n: (E, cols, rows) for n, (E, rows, cols) in _fused(disk)}  # only the hub turns them
    layouts = [key_map.disk_tensors(specs, layout) for layout in key_map.layouts]
    assert disk | turned in [{n: s.shape for n, s in layout.items()} for layout in layouts]
    assert bool(turned) == (name == "qwen3_vl_moe")
    published = oracles.to_dict(cfg).get("architectures") or [type(oracle).__name__]
    assert [key_map.architecture] == published


def test_holes_carry_over_and_the_first_entry_wins():
    entries = (
        Entry(path="a/{i}/norm/{leaf}", name="x.{i}.n_{leaf}"),
        Entry(path="a/{i}/{layer}/{leaf}", name="x.{i}.{layer}.{leaf}", disk_shape=(2, 3)),
    )
    key_map = KeyMap(entries=entries, architecture="A")
    leaf = spec((6,), "embed", ONES)
    stored = key_map.disk_tensors({"a": [{"norm": {"weight": leaf}, "up": {"bias": leaf}}]})
    assert {name: (s.path, s.shape) for name, s in stored.items()} == {
        "x.0.n_weight": ("a/0/norm/weight", (6,)),
        "x.0.up.bias": ("a/0/up/bias", (2, 3)),
    }


def test_tensors_go_to_disk_and_back():
    leaf = spec((2, 3, 4), "experts mlp embed", ONES)
    entries = (
        Entry(path="a", name="turned", dims=(0, 2, 1)),
        Entry(path="b", name="reshaped", disk_shape=(6, 2, 2)),
        Entry(path="c", name="both", dims=(2, 0, 1), disk_shape=(4, 6)),
    )
    stored = KeyMap(entries=entries, architecture="A").disk_tensors({"a": leaf, "b": leaf, "c": leaf})
    value = torch.arange(24).view(2, 3, 4)
    assert [s.shape for s in stored.values()] == [(2, 4, 3), (6, 2, 2), (4, 6)]
    assert torch.equal(stored["turned"].to_disk(value), value.transpose(1, 2))
    assert torch.equal(stored["reshaped"].to_disk(value), value.view(6, 2, 2))
    assert stored["both"].to_disk(value)[1].tolist() == value[:, :, 1].flatten().tolist()
    for one in stored.values():
        assert one.to_disk(value).shape == one.shape
        assert torch.equal(one.from_disk(one.to_disk(value)), value)
    assert stored["turned"].to_disk(value).data_ptr() == value.data_ptr()  # a view


def test_layouts_differ_where_they_say_so():
    leaf = spec((2, 3), "mlp embed", ONES)
    turned = Entry(path="{name}", name="{name}.T", dims=(1, 0))
    key_map = KeyMap(
        entries=(Entry(path="{name}", name="{name}.plain"),),
        architecture="A",
        layouts={"hub": (turned,), "transformers": ()},
    )
    assert {n: s.shape for n, s in key_map.disk_tensors({"x": leaf}).items()} == {"x.T": (3, 2)}
    assert {n: s.shape for n, s in key_map.disk_tensors({"x": leaf}, "transformers").items()} == {"x.plain": (2, 3)}
    with pytest.raises(ValueError, match="layout 'disk' is unknown; use one of hub, transformers"):
        key_map.disk_tensors({"x": leaf}, "disk")


def test_unmapped_and_doubly_mapped_paths_are_refused():
    leaf = spec((6,), "embed", ONES)
    key_map = KeyMap(entries=(Entry(path="{a}", name="same"),), architecture="A")
    with pytest.raises(ValueError, match="'x' and 'y' both map to 'same'"):
        key_map.disk_tensors({"x": leaf, "y": leaf})
    with pytest.raises(ValueError, match="'x/y' has no Hugging Face name"):
        key_map.disk_tensors({"x": {"y": leaf}})
