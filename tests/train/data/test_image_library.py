"""Image files of all modes and odd sizes become the patches that the library's own processors make of them."""

from typing import Any

import pytest
import torch

from mmfn.models.data import glm_vision, qwen2_vision, qwen_vision
from mmfn.train.data.image import decode_image
from tests.oracles.torchvision import in_place_of_torchvision, library_class
from tests.train.data.test_image import CASES, library, random_image

CONFIG = {
    "patch_size": 4,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "size": {"shortest_edge": 1024, "longest_edge": 4096},
}
QWEN, GLM = (
    "qwen2_vl.image_processing_qwen2_vl.Qwen2VLImageProcessor",
    "glm4v.image_processing_glm4v.Glm4vImageProcessor",
)
FAMILIES: dict[str, tuple[Any, str]] = {
    "qwen2_vl": (qwen2_vision, QWEN),
    "qwen3_vl": (qwen_vision, QWEN),
    "glm4v": (glm_vision, GLM),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("mode", "suffix", "seed"), CASES)
def test_patches_are_those_of_the_library(tmp_path, family, mode, suffix, seed):
    side, name = FAMILIES[family]
    path = tmp_path / f"a.{suffix}"
    image = random_image(mode, seed)
    while max(image.size) > 100 * min(image.size) or min(image.size) < 4:  # too long and thin for the models
        seed += 2
        image = random_image(mode, seed)
    image.save(path)
    media = side.processor({"image_processor": CONFIG, "video_processor": CONFIG}, None).image(decode_image(path))
    with in_place_of_torchvision():
        theirs = library_class(name)(**CONFIG)(images=[library(path)], return_tensors="pt")
    assert list(media.grid) == theirs["image_grid_thw"][0].tolist()
    assert torch.equal(media.in_floats().inputs_UF, theirs["pixel_values"])
