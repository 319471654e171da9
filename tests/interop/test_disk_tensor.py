"""Leaves that are stored in several tensors: whole and by slices, in three generations of names."""

import random
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mmfn import spec, tree
from mmfn.interop import export
from mmfn.interop.checkpoint import from_tensors, load_params, open_weights
from mmfn.models.disk_tensor import slices, whole
from mmfn.models.keymap import Entry, KeyMap
from tests.interop import reads
from tests.interop.split_cases import BLOCK, HUB, KEY_MAP, SPECS, E, by_hand, write

LAYOUTS = list(KEY_MAP.layouts)


@pytest.fixture(scope="module")
def params():
    drawn = spec.init_params(SPECS, seed=1)
    return tree.map(lambda x: x + torch.arange(x.numel()).reshape(x.shape), drawn)


@pytest.fixture(params=LAYOUTS)
def folder(request, params, tmp_path):
    write(tmp_path, params, request.param)
    return tmp_path


def load(folder, **kwargs):
    return load_params(folder, SPECS, KEY_MAP, **{"dtype": None, "device": "cpu", **kwargs})


def assert_equal(a, b):
    assert tree.paths(a) == tree.paths(b)
    for (path, x), y in zip(tree.items(a), tree.leaves(b), strict=True):
        assert torch.equal(x, y), path


@pytest.fixture
def count_reads(monkeypatch):
    """Bytes that were taken out of files, by name of the tensor."""
    return reads.count(monkeypatch)[threading.current_thread().name]


def test_every_generation_loads_to_the_same_leaves(folder, params):
    loaded = load(folder)
    assert_equal(loaded, params)
    assert all(leaf.is_contiguous() for leaf in tree.leaves(loaded))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_shapes_and_values_are_those_written_by_hand(layout, params):
    leaves, want = dict(tree.items(params)), by_hand(params, layout)
    tensors = KEY_MAP.disk_tensors(SPECS, layout)
    assert {n: t.shape for n, t in tensors.items()} == {n: tuple(t.shape) for n, t in want.items()}
    for name, tensor in tensors.items():
        stored = tensor.to_disk(leaves[tensor.path])
        assert torch.equal(stored, want[name])
        assert torch.equal(tensor.from_disk(stored), leaves[tensor.path][slices(tensor.ranges)])
        assert stored.untyped_storage().data_ptr() == leaves[tensor.path].untyped_storage().data_ptr()  # a view
    assert_equal(from_tensors(want, SPECS, KEY_MAP), params)


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 500])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_generation_is_written(layout, max_shard_bytes, params, tmp_path):
    """The tensors of a leaf are views of one memory, which files do not share."""
    dtypes = {path: leaf.dtype for path, leaf in tree.items(params)}
    what = export.contents(KEY_MAP.disk_tensors(SPECS, layout), dtypes, {}, max_shard_bytes=max_shard_bytes)
    export.save(tmp_path / "out", what, (export.Piece.whole(*item) for item in tree.items(params)))
    found = {n: v for file in (tmp_path / "out").glob("*.safetensors") for n, v in load_file(file).items()}
    want = by_hand(params, layout)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert_equal(load(tmp_path / "out"), params)


def test_gradients_flow_from_tensors_to_leaves(params):
    tensors = {name: value.requires_grad_() for name, value in by_hand(params, "hub").items()}
    joint = from_tensors(tensors, SPECS, KEY_MAP)["layers"][1]["experts"]["gate_up"]
    weights = torch.randn_like(joint)
    (joint * weights).sum().backward()
    assert torch.equal(tensors["layers.1.mlp.experts.2.up_proj.weight"].grad, weights[2, 4:])


def random_ranges(r, shape):
    return tuple(tuple(sorted(r.choices(range(size + 1), k=2))) if r.random() < 0.7 else (0, size) for size in shape)


@pytest.mark.parametrize("seed", range(30))
def test_a_shard_is_the_slice_of_the_whole_and_nothing_else_is_read(seed, folder, params, count_reads):
    r = random.Random(seed)
    shards = {path: random_ranges(r, leaf.shape) for path, leaf in tree.items(SPECS) if r.random() < 0.9}
    want = {path: leaf[slices(shards.get(path, whole(leaf.shape)))] for path, leaf in tree.items(params)}
    loaded = dict(tree.items(load(folder, shards=shards)))
    for path, leaf in loaded.items():
        assert torch.equal(leaf, want[path]), path
        assert leaf.is_contiguous()
        assert leaf.dtype == torch.float32
    merged = shards.get("patches/weight", ((0, 6), (0, 24)))  # its second dim is four on disk, so it is read whole
    extra = (
        4 * (merged[0][1] - merged[0][0]) * (24 - (merged[1][1] - merged[1][0]))
        if want["patches/weight"].numel()
        else 0
    )
    assert sum(count_reads.values()) == sum(leaf.nbytes for leaf in loaded.values()) + extra


def test_the_ranks_of_a_layout_read_every_byte_once(tmp_path, params, count_reads):
    """Experts over ep, rows over dp: what 3 x 2 ranks read adds up to the file."""
    write(tmp_path, params, "hub")
    for expert in range(E):
        for half in range(2):
            with open_weights(tmp_path, SPECS, KEY_MAP) as weights:
                part = weights.read_slice(
                    "layers/0/experts/gate_up", ((expert, expert + 1), (4 * half, 4 * half + 4), (0, 6))
                )
            assert torch.equal(part, params["layers"][0]["experts"]["gate_up"][expert, None, 4 * half : 4 * half + 4])
    assert count_reads == {
        f"layers.0.mlp.experts.{e}.{name}_proj.weight": 4 * 4 * 6 for e in range(E) for name in ("gate", "up")
    }


def test_dtypes_of_a_leaf_in_several_tensors(tmp_path, params):
    """The widest that is stored, whichever tensors a shard touches; asked for, or declared, comes first."""
    narrow = {n: v.bfloat16() for n, v in by_hand(params, "hub").items() if ".experts.0." in n or "bias" in n}
    write(tmp_path, params, "hub", **narrow)
    path = "layers/0/experts/down"
    for ranges in (None, ((0, 1), (0, 6), (0, 4)), ((1, 1), (0, 6), (0, 4))):
        with open_weights(tmp_path, SPECS, KEY_MAP) as weights:
            assert weights.read_slice(path, ranges).dtype == torch.float32
        with open_weights(tmp_path, SPECS, KEY_MAP, dtype=torch.float16) as weights:
            assert weights.read_slice(path, ranges).dtype == torch.float16
            assert weights.read_slice("layers/0/router/bias").dtype == torch.float32


def test_generations_must_not_be_mixed(tmp_path, params):
    hub, fused = by_hand(params, "hub"), by_hand(params, "transformers")
    mixed = {n: v for n, v in hub.items() if "layers.1.mlp.experts" not in n}
    mixed |= {n: v for n, v in fused.items() if "layers.1.mlp.experts" in n}
    with pytest.raises(ValueError, match=r"experts.* the layout of '(hub|transformers)', but other .* in one layout"):
        from_tensors(mixed, SPECS, KEY_MAP)
    with pytest.raises(ValueError, match=r"the layout of 'transformers', but other tensors have that of 'hub'"):
        from_tensors(hub | fused, SPECS, KEY_MAP)


def test_what_is_missing_of_a_leaf_is_named(params):
    tensors = by_hand(params, "hub")
    del tensors["layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(
        ValueError, match=r"lacks tensor 'layers.1.mlp.experts.2.up_proj.weight' for parameter layers/1/"
    ):
        from_tensors(tensors, SPECS, KEY_MAP)
    tensors = by_hand(params, "hub")
    tensors["layers.1.mlp.experts.3.up_proj.weight"] = tensors["layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(ValueError, match=r"'layers.1.mlp.experts.3.up_proj.weight' in it of the mapping belongs to no"):
        from_tensors(tensors, SPECS, KEY_MAP)


def test_what_is_ignored_or_verbatim_is_not_read(folder, params, count_reads):
    more = {"mtp.norm.weight": torch.ones(3), "model.layers.0.rotary_emb.inv_freq": torch.ones(2)}
    layout = next(name for name in LAYOUTS if by_hand(params, name).keys() == files_of(folder))
    write(folder, params, layout, **more)
    with open_weights(folder, SPECS, KEY_MAP) as weights:
        assert_equal(weights.read(), params)
        assert weights.account.verbatim == ("mtp.norm.weight",)
        assert weights.account.layout == layout
    assert not count_reads.keys() & more.keys()
    strict = replace(KEY_MAP, ignore=(), verbatim=())
    for name in more:
        with pytest.raises(ValueError, match=f"tensor '{name}' in .* belongs to no parameter"):
            from_tensors(by_hand(params, layout) | {name: more[name]}, SPECS, strict)


def files_of(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": ()}, "has names .* and sizes None; give one per name"),
        ({"name": ("a", "b"), "sizes": (1,)}, "give one per name"),
        ({"name": "a.{j}.{k}"}, "has other holes .* a name may have one, in every name"),
        ({"name": ("a.{j}", "b.{k}"), "join": 1}, "a name may have one, in every name"),
        ({"name": ("a.{j}", "b"), "join": 1}, "a name may have one, in every name"),
        ({"name": ("a.{j}", "b.{j}")}, "numbers dim 0 by {j}; join its names along another dim"),
    ],
)
def test_entries_that_say_nothing_sensible_are_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        Entry(path="x", **entry)


def test_parts_that_are_no_leaf_are_refused():
    for entry in (Entry(path="x", name=("a", "b")), Entry(path="x", name=("a", "b"), sizes=(3, 3))):
        with pytest.raises(ValueError, match=r"leaf 'x' has 7 along dim 0, not the sum of \[3, 3\]; correct sizes"):
            KeyMap(entries=(entry,), architecture="A").disk_tensors({"x": spec.spec((7,), "embed", spec.ONES)})
    with pytest.raises(ValueError, match=r"key map has layouts \['hub'\] but not 'transformers'"):
        KeyMap(entries=(), architecture="A", layouts={"hub": HUB})
    with pytest.raises(ValueError, match=r"both map to 'layers.0.mlp.experts.0.gate_proj.weight'"):
        KeyMap(
            entries=(*HUB, Entry(path="x", name="layers.0.mlp.experts.0.gate_proj.weight")), architecture="A"
        ).disk_tensors({"layers": [{"experts": BLOCK["experts"]}], "x": spec.spec((4, 6), "mlp embed", spec.ONES)})
