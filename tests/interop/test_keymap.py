"""Names of parameters: every family's map against the names transformers uses."""

import pytest
import torch

from mmfn.interop.keymap import Entry, KeyMap
from mmfn.models import FAMILIES, family
from mmfn.spec import ONES, spec
from tests import oracles


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("is_tied", [True, False])
def test_names_and_shapes_equal_transformers(name, is_tied):
    cfg = oracles.config(tie_word_embeddings=is_tied, text={"attention_bias": True})
    model = family(name)
    own = model.config_from_hf(cfg.to_dict())
    stored = model.key_map(own).stored(model.specs(own))
    with torch.device("meta"):
        oracle = oracles.Oracle(cfg)
    want = {n: tuple(p.shape) for n, p in oracle.named_parameters()}
    assert {n: s.shape for n, s in stored.items()} == want


def test_holes_carry_over_and_the_first_entry_wins():
    entries = (
        Entry(path="a/{i}/norm/{leaf}", name="x.{i}.n_{leaf}"),
        Entry(path="a/{i}/{layer}/{leaf}", name="x.{i}.{layer}.{leaf}", disk_shape=(2, 3)),
    )
    key_map = KeyMap(entries=entries, architecture="A")
    leaf = spec((6,), "embed", ONES)
    stored = key_map.stored({"a": [{"norm": {"weight": leaf}, "up": {"bias": leaf}}]})
    assert {name: (s.path, s.shape) for name, s in stored.items()} == {
        "x.0.n_weight": ("a/0/norm/weight", (6,)),
        "x.0.up.bias": ("a/0/up/bias", (2, 3)),
    }


def test_unmapped_and_doubly_mapped_paths_are_refused():
    leaf = spec((6,), "embed", ONES)
    key_map = KeyMap(entries=(Entry(path="{a}", name="same"),), architecture="A")
    with pytest.raises(ValueError, match="'x' and 'y' both map to 'same'"):
        key_map.stored({"x": leaf, "y": leaf})
    with pytest.raises(ValueError, match="'x/y' has no Hugging Face name"):
        key_map.stored({"x": {"y": leaf}})
