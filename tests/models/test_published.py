"""Published checkpoints: names, shapes and counts of every size in `configs/models`, without a download.

What a file holds is in `tests/goldens/names.json`, written by transformers and independent of mmfn; what was published
beside it (counts of parameters and tensors) stands here.
"""

import json
from math import prod
from typing import NamedTuple

import pytest

from mmfn import tree
from mmfn.models import FAMILIES, family
from mmfn.train.build.model import find_family
from mmfn.train.planning.request import read, with_world
from tests.goldens import make_name_goldens as goldens

SIZES = goldens.sizes()
NAMES = json.loads(goldens.PAGE.read_text(encoding="utf-8"))
VERBATIM = ("talker.", "code2wav.")  # parts of a model that are not trained here


class Counts(NamedTuple):
    """Elements of what is trained; of the file's other parts; tensors in the file, where an inventory is known."""

    elements: int
    others: int = 0
    tensors: int | None = None


COUNTS = {
    "Qwen2.5-VL-3B": Counts(3_754_622_976),
    "Qwen2.5-VL-7B": Counts(8_292_166_656),
    "Qwen2.5-VL-32B": Counts(33_452_718_336),
    "Qwen2.5-VL-72B": Counts(73_410_777_344),
    "Qwen3-VL-2B": Counts(2_127_532_032),
    "Qwen3-VL-4B": Counts(4_437_815_808),
    "Qwen3-VL-8B": Counts(8_767_123_696, tensors=750),
    "Qwen3-VL-32B": Counts(33_357_390_064),
    "Qwen3-VL-30B-A3B": Counts(31_070_754_032, tensors=882),
    "Qwen3-VL-235B-A22B": Counts(235_670_022_896, tensors=1388),
    "Qwen3.5-0.8B": Counts(852_985_920 + 20_452_864),  # + its layer that predicts a further token
    "Qwen3.5-2B": Counts(2_213_241_664 + 60_828_160),
    "Qwen3.5-4B": Counts(4_539_265_536 + 120_599_552, tensors=738),
    "Qwen3.5-9B": Counts(9_409_813_744 + 243_290_624),
    "Qwen3.5-27B": Counts(27_356_728_560 + 424_699_392, tensors=1199),
    "Qwen3.5-35B-A3B": Counts(35_107_181_936 + 844_640_768, tensors=1811),
    "Qwen3.5-122B-A10B": Counts(122_562_817_776 + 2_523_679_232),
    "Qwen3.5-397B-A17B": Counts(396_802_360_816 + 6_595_568_128),
    "Qwen3-Omni-30B-A3B": Counts(31_719_205_488, others=35_259_818_545 - 31_719_205_488, tensors=28_010),
    "GLM-4.5V": Counts(107_710_933_120, tensors=18_106),  # 45 x 128 of them correct the router
}


def test_every_size_has_its_names_and_its_count():
    assert set(SIZES) == set(NAMES) == set(COUNTS)


def test_every_family_has_a_published_size_and_every_size_a_family():
    assert {hf["model_type"] for hf in SIZES.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", SIZES)
def test_the_golden_is_what_transformers_declares_and_what_was_published(name):
    shapes = goldens.unfold(NAMES[name])
    assert shapes == goldens.tensors(SIZES[name])
    counts = COUNTS[name]
    others = sum(prod(shape) for key, shape in shapes.items() if key.startswith(VERBATIM))
    assert (sum(map(prod, shapes.values())) - others, others) == counts[:2]
    assert counts.tensors in (len(shapes), None)


@pytest.mark.parametrize("name", SIZES)
def test_every_name_and_shape_of_the_published_file_and_no_other(name):
    model = family(SIZES[name]["model_type"])
    cfg = model.config_from_hf(SIZES[name])
    key_map, want = model.key_map(cfg), goldens.unfold(NAMES[name])
    stored = {key: tensor.shape for key, tensor in key_map.disk_tensors(model.specs(cfg)).items()}
    others = {key for key in want if key.startswith(VERBATIM)}
    assert stored == {key: shape for key, shape in want.items() if key not in others}
    assert set(key_map.verbatim_of(list(want.keys() - stored.keys()))) == others
    assert not key_map.verbatim_of(list(stored))
    assert not any(key_map.is_ignored(key) for key in stored)


@pytest.mark.parametrize("name", SIZES)
def test_the_count_is_the_published_one_to_the_last_digit(name):
    model = family(SIZES[name]["model_type"])
    leaves = tree.leaves(model.specs(model.config_from_hf(SIZES[name])))
    assert sum(prod(leaf.shape) for leaf in leaves) == COUNTS[name].elements


@pytest.mark.parametrize("name", SIZES)
def test_a_plan_takes_the_config_without_a_download(name):
    loaded = with_world(read(str(goldens.MODELS / name / "config.json"), []), 256)
    model, cfg = find_family(loaded.config.model)
    assert model.name == SIZES[name]["model_type"]
    assert cfg == model.config_from_hf(SIZES[name])
    assert loaded.config.layout.sizes.world == 256
