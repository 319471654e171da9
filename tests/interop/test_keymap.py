"""Names of parameters: every family's map against the names transformers uses."""

import pytest
import torch

from mmfn.models import FAMILIES, family
from mmfn.models.keymap import Entry, KeyMap
from mmfn.spec import ONES, spec
from tests import oracles


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("is_tied", [True, False])
def test_names_and_shapes_equal_transformers(name, is_tied):
    cfg = oracles.config(family=name, tie_word_embeddings=is_tied, text={"attention_bias": True})
    model = family(name)
    own = model.config_from_hf(cfg.to_dict())
    with torch.device("meta"):
        oracle = oracles.oracle_class(cfg)(cfg)
    want = {n: tuple(p.shape) for n, p in oracle.named_parameters()}
    stored = model.key_map(own).disk_tensors(model.specs(own), "transformers")
    assert {n: s.shape for n, s in stored.items()} == want
    hub = model.key_map(own).disk_tensors(model.specs(own))
    turned = {n: (E, cols, rows) for n, (E, rows, cols) in ((n, s) for n, s in want.items() if ".experts." in n)}
    assert {n: s.shape for n, s in hub.items()} == want | turned
    assert bool(turned) == ("moe" in name)
    assert model.key_map(own).architecture == type(oracle).__name__


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
