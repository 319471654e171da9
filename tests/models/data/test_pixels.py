import hashlib
import json
from pathlib import Path

import pytest
import torch

from mmfn.models.data.pixels import ImageSpec, patchify, preprocess_image, target_size
from mmfn.models.data.qwen_vision import IMAGE_DEFAULTS
from mmfn.models.layers.patches import lay_frames
from tests.oracles.torchvision import in_place_of_torchvision, library_class

GOLDENS = json.loads((Path(__file__).parents[2] / "goldens" / "media.json").read_text(encoding="utf-8"))
TINY = {"patch_size": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def pixels(height, width):
    """The formula of tests/goldens/make_media_goldens.py, for one image."""
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(height), torch.arange(width), indexing="ij")
    return ((x * x // 3 + 5 * y + 37 * c + x * y // 7) % 256).to(torch.uint8)


def from_hf(config):
    return ImageSpec.from_hf(config, IMAGE_DEFAULTS)


def spec(low=256, high=4096):
    return from_hf({**TINY, "size": {"shortest_edge": low, "longest_edge": high}})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", GOLDENS["images"], ids=lambda c: "x".join(map(str, c["shape"])))
def test_bits_of_the_torchvision_backend(case, layout):
    image = pixels(*case["shape"])
    if layout == "channels_last":  # as decode_image returns it
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    before = image.clone()
    media = preprocess_image(image, from_hf(case["config"]))
    assert list(media.grid) == case["grid"]
    floats_UF = media.in_floats().inputs_UF
    assert (media.inputs_UF.dtype, floats_UF.dtype) == (torch.uint8, torch.float32)
    assert floats_UF.flatten()[:4].tolist() == case["first"]
    assert hashlib.sha256(floats_UF.numpy().tobytes()).hexdigest() == case["sha256"]
    assert torch.equal(image, before)


@pytest.mark.parametrize("numbers", [{}, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}])
def test_every_byte_becomes_the_float_of_the_library(numbers):
    name = "qwen2_vl.image_processing_qwen2_vl.Qwen2VLImageProcessor"
    config = {**IMAGE_DEFAULTS, **numbers, "patch_size": 4, "size": {"shortest_edge": 256, "longest_edge": 256}}
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    media = preprocess_image(image, from_hf(config))
    with in_place_of_torchvision():
        theirs = library_class(name)(**config)(images=[image], return_tensors="pt")
    assert sorted(set(media.inputs_UF.flatten().tolist())) == list(range(256))
    assert torch.equal(media.in_floats().inputs_UF, theirs["pixel_values"])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (64, 96), (61, 300), (1, 40), (427, 320)])
def test_pil_backend_agrees_within_its_rounding(height, width):
    from transformers import Qwen2VLImageProcessorPil

    image, config = pixels(height, width), {**TINY, "size": {"shortest_edge": 256, "longest_edge": 40000}}
    theirs = Qwen2VLImageProcessorPil(**config)(images=[image.numpy()], return_tensors="pt")
    ours = preprocess_image(image, from_hf(config))
    assert list(ours.grid) == theirs["image_grid_thw"][0].tolist()
    levels = (ours.in_floats().inputs_UF - theirs["pixel_values"]).abs() * 127.5  # in grey levels of 256
    if target_size(height, width, from_hf(config)) == (height, width):
        assert levels.max() < 1e-3
    assert levels.mean() < 0.6  # PIL's filter rounds its weights otherwise: a level here and there
    assert levels.max() < 16


def test_patches_stay_in_merge_blocks():
    """Every patch holds the pixels that its coordinates in the packed batch say."""
    image = torch.randint(256, (1, 3, 16, 24), dtype=torch.uint8).expand(2, -1, -1, -1)
    media = patchify(image, spec())
    assert media.grid == (1, 4, 6)
    sample = _sample(media)
    coords = lay_frames(sample, 2, 96).coords_P4
    for patch, (row, column, _, _) in zip(media.inputs_UF, coords.tolist(), strict=True):
        expected = image[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert torch.equal(patch.reshape(3, 2, 4, 4), expected.transpose(0, 1))


def _sample(media):
    from mmfn.batch import IMAGE, Sample

    tokens_T = torch.zeros(media.inputs_UF.shape[0] // 4, dtype=torch.int64)
    return Sample(tokens_T=tokens_T, labels_T=tokens_T, kinds_T=torch.full_like(tokens_T, IMAGE), images=(media,))


def test_spec_reads_both_generations_of_configs():
    new = from_hf({"size": {"shortest_edge": 100, "longest_edge": 200}, "patch_size": 16})
    old = from_hf({"min_pixels": 100, "max_pixels": 200, "patch_size": 16})
    older = from_hf({"size": {"min_pixels": 100, "max_pixels": 200}, "patch_size": 16})
    assert new == old == older
    assert (new.min_pixels, new.max_pixels, new.merge_size, new.patch_values) == (100, 200, 2, 3 * 2 * 16 * 16)
    defaults = from_hf({})
    assert (defaults.patch_size, defaults.min_pixels, defaults.max_pixels) == (14, 3136, 1003520)
    assert defaults.mean == (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_resize": False}, "'do_resize' is False, only True"),
        ({"resample": 2}, "'resample' is 2, only 3"),
        ({"rescale_factor": 1.0}, "'rescale_factor' is 1.0"),
        ({"size": 224}, "'size' must be a dict, got 224"),
        ({"size": {"shortest_edge": 100}}, "'size' needs shortest_edge and longest_edge, got {'shortest_edge': 100}"),
        ({"patch_size": 0}, "patch_size of an image processor must be a positive integer, got 0"),
        ({"merge_size": "2"}, "merge_size .* got '2'"),
        ({"min_pixels": 10, "max_pixels": 5}, "min_pixels 10 above max_pixels 5"),
        ({"image_mean": [0.5]}, "'image_mean' must be 3 numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "std .* must not be zero"),
        ({"image_mean": [float("nan")] * 3}, "mean .* must be 3 finite floats"),
    ],
)
def test_bad_spec(config, message):
    with pytest.raises(ValueError, match=message):
        from_hf(config)


def test_bad_images():
    with pytest.raises(ValueError, match=r"must be uint8\[3, H, W\], got torch.float32"):
        preprocess_image(torch.zeros(3, 8, 8), spec())
    with pytest.raises(ValueError, match=r"got torch.uint8 \(1, 8, 8\)"):
        preprocess_image(torch.zeros(1, 8, 8, dtype=torch.uint8), spec())
    with pytest.raises(ValueError, match="2 x 500 pixels is longer than 200 times"):
        preprocess_image(torch.zeros(3, 2, 500, dtype=torch.uint8), spec())
