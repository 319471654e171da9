"""Image files of all modes against Pillow and transformers' own steps, and files that must not be decoded."""

import hashlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from mmfn.models.data.pixels import ImageSpec, preprocess_image
from mmfn.models.data.qwen_vision import IMAGE_DEFAULTS
from mmfn.train.data import Limits
from mmfn.train.data.image import decode_image, image_size

MODES = {  # suffixes that hold a mode without changing it
    "1": ("png", "tiff", "bmp", "gif"),
    "L": ("png", "jpg", "tiff", "bmp", "webp", "jp2"),
    "LA": ("png", "tiff"),
    "P": ("png", "gif", "bmp", "tiff"),
    "RGB": ("png", "jpg", "tiff", "bmp", "webp", "jp2", "ppm", "tga"),
    "RGBA": ("png", "tiff", "webp", "tga"),
    "CMYK": ("jpg", "tiff"),
    "YCbCr": ("jpg", "tiff"),
    "PA": ("gif",),
}
CASES = [(mode, suffix, seed) for mode, suffixes in MODES.items() for suffix in suffixes for seed in (0, 1)]
LOSSLESS = ("png", "tiff", "bmp", "webp", "ppm", "jp2", "tga")


def pixels(height, width):
    """uint8[3, H, W]: edges and ramps."""
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(height), torch.arange(width), indexing="ij")
    return ((x * x // 3 + 5 * y + 37 * c + x * y // 7) % 256).to(torch.uint8)


def picture(height, width):
    return Image.fromarray(pixels(height, width).permute(1, 2, 0).contiguous().numpy())


def library(path):
    """uint8[3, H, W] as `load_image` reads it; alpha as `convert_to_rgb` of the processors lays it on white."""
    with Image.open(path) as image:
        has_alpha = "A" in image.getbands() or "transparency" in image.info
        rgb = convert_to_rgb(image, return_numpy=True) if has_alpha else np.array(load_image(image))
        return torch.from_numpy(rgb).permute(2, 0, 1)


def random_image(mode, seed):
    """Of odd and even sides up to 64, of noise; every third a mode's own palette or alpha."""
    draw = np.random.default_rng([seed, *mode.encode()])
    height, width = (int(side) for side in draw.integers(1, 65, 2))
    if mode == "PA":  # a palette of which one colour is transparent
        image = Image.fromarray(draw.integers(0, 16, (height, width), np.uint8))
        image.putpalette(draw.integers(0, 256, 48, np.uint8).tobytes())
        image.info["transparency"] = 3
        return image
    bands = Image.new(mode, (1, 1)).getbands()
    if mode in ("1", "P"):
        return Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
    planes = [Image.fromarray(draw.integers(0, 256, (height, width), np.uint8)) for _ in bands]
    return Image.merge(mode, planes)


def test_there_are_enough_cases():
    assert len(CASES) >= 60


@pytest.mark.parametrize(("mode", "suffix", "seed"), CASES)
def test_images_of_all_modes_are_those_of_the_library(tmp_path, mode, suffix, seed):
    path = tmp_path / f"a.{suffix}"
    image = random_image(mode, seed)
    image.save(path)
    image_u8 = decode_image(path)
    assert image_u8.dtype == torch.uint8
    assert image_u8.shape[0] == 3
    assert image_u8.shape[1:] == (image.height, image.width)
    assert torch.equal(image_u8, library(path))
    assert torch.equal(image_u8, decode_image(path.read_bytes()))


@pytest.mark.parametrize("place", range(9))
def test_files_become_the_patches_of_the_torchvision_backend(tmp_path, media_goldens, place):
    """From a file to what the encoder reads; whether it lies on its side or holds an alpha changes nothing."""
    case, suffix = media_goldens["images"][place], LOSSLESS[place % len(LOSSLESS)]
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture(*case["shape"])
    image.save(tmp_path / f"plain.{suffix}", lossless=True)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for name in (f"plain.{suffix}", "alpha.png", "turned.png"):
        media = preprocess_image(decode_image(tmp_path / name), ImageSpec.from_hf(case["config"], IMAGE_DEFAULTS))
        assert hashlib.sha256(media.in_floats().inputs_UF.numpy().tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "LA", "I;16"])
def test_decode_follows_exif(tmp_path, orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    image = picture(5, 9).convert("RGB" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(pixels(5, 9)[0].numpy().astype(np.uint16) * 257)
    image.save(path, exif=exif)
    turns = {  # of [..., H, W], by the standard's words for row 0 and column 0
        1: lambda x: x,
        2: lambda x: x.flip(-1),
        3: lambda x: x.flip(-1, -2),
        4: lambda x: x.flip(-2),
        5: lambda x: x.mT,
        6: lambda x: x.mT.flip(-1),
        7: lambda x: x.mT.flip(-1, -2),
        8: lambda x: x.mT.flip(-2),
    }
    image.save(tmp_path / "plain.png")
    assert torch.equal(decode_image(path), turns[orientation](decode_image(tmp_path / "plain.png")))
    if mode == "RGB":
        assert torch.equal(decode_image(path), torch.from_numpy(np.array(load_image(str(path)))).permute(2, 0, 1))


def test_what_is_transparent_is_white(tmp_path):
    rgba = np.array([[[10, 20, 30, 255], [0, 0, 0, 0], [100, 0, 200, 51]]], np.uint8)  # 51 is a fifth
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png").permute(1, 2, 0).tolist() == [
        [[10, 20, 30], [255, 255, 255], [224, 204, 244]]
    ]
    for mode, values, clear, expected in (("L", [[7, 0]], 7, [255, 0]), ("P", [[1, 0]], 0, [40, 255])):
        image = Image.fromarray(np.array(values, np.uint8))
        if mode == "P":
            image.putpalette([0, 0, 0, 40, 40, 40])
        image.save(tmp_path / "b.png", transparency=clear)
        assert decode_image(tmp_path / "b.png")[:, 0].tolist() == [expected] * 3


def test_of_many_pictures_it_is_the_first(tmp_path):
    first, second = picture(8, 9), picture(9, 8).resize((9, 8))
    for suffix in ("tiff", "png", "webp", "gif"):
        settings = {"lossless": True} if suffix == "webp" else {}
        first.save(tmp_path / f"many.{suffix}", save_all=True, append_images=[second], **settings)
        first.save(tmp_path / f"one.{suffix}", **settings)
        with Image.open(tmp_path / f"many.{suffix}") as image:
            assert image.n_frames == 2
        assert torch.equal(decode_image(tmp_path / f"many.{suffix}"), decode_image(tmp_path / f"one.{suffix}"))


@pytest.mark.parametrize("content", [b"", b"no image at all", *("png", "jpeg", "gif", "tiff", "webp", "bmp")])
def test_broken_image_is_one_sentence(tmp_path, content):
    if isinstance(content, str):
        buffer = io.BytesIO()
        picture(50, 50).save(buffer, content)
        content = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image '.*broken\.png' could not be decoded") as error:
        decode_image(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="image bytes could not be decoded"):
        decode_image(content)


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        (np.array([[0, 255]], np.uint16), True),
        (np.array([[0, 256]], np.uint16), False),
        (np.array([[0, 70_000]], np.int32), False),
        (np.array([[0.0, 0.5]], np.float32), False),
        (np.array([[0.0, np.nan]], np.float32), False),
        (np.array([[0.0, 255.0]], np.float32), True),
    ],
    ids=str,
)
def test_values_beyond_8_bits_are_refused_not_clipped(tmp_path, values, fits):
    path = tmp_path / "a.tiff"
    Image.fromarray(values).save(path)
    if fits:
        assert decode_image(path).tolist() == [values.astype(int).tolist()] * 3
    else:
        with pytest.raises(ValueError, match="values do not fit 8 bits"):
            decode_image(path)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits, colour, rows):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "bands"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["grey", "rgb", "la", "rgba"])
def test_of_16_bits_of_png_the_upper_8_count(colour, bands):
    """Grey ones too, which the library clips at 255: by the format 65535 is white in all of them."""
    values = np.random.default_rng(colour).integers(0, 2**16, (7, 5, bands)).astype(">u2")
    if bands in (2, 4):
        values[..., -1] = 2**16 - 1
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    expected = torch.from_numpy((values >> 8).astype(np.uint8))[..., : 3 if bands > 2 else 1].expand(-1, -1, 3)
    assert torch.equal(decode_image(png(5, 7, 16, colour, rows)).permute(1, 2, 0), expected)


def test_a_bomb_is_refused_by_what_it_says_of_its_size(tmp_path):
    bomb = png(10_000, 9_000, 1, 0, bytes(1251 * 9_000))
    assert len(bomb) < 20_000
    path = tmp_path / "bomb.png"
    for width, height in ((10_000, 9_000), (2**31 - 1, 2**31 - 1)):
        path.write_bytes(png(width, height, 1, 0, b""))  # there is nothing to decode
        with pytest.raises(
            ValueError, match=r"bomb\.png' could not be decoded \(.*(max_image_pixels|decompression bomb)"
        ):
            decode_image(path)
    picture(30, 40).save(path)
    assert decode_image(path, Limits(image_pixels=1200)).shape == (3, 30, 40)
    with pytest.raises(ValueError, match="it has 40 x 30 pixels, more than the 1199 of max_image_pixels"):
        decode_image(path, Limits(image_pixels=1199))
    for pixels_ in (0, 200_000_000):
        with pytest.raises(ValueError, match=r"image_pixels must be in 1 \.\.\. 178956970"):
            Limits(image_pixels=pixels_)


def test_formats_that_are_not_read(tmp_path, monkeypatch):
    """Pillow has Ghostscript, a program, make pictures of EPS files; an ICO file may hold more than it says."""
    monkeypatch.setattr("subprocess.Popen", None)
    for suffix in ("eps", "ico"):
        picture(32, 32).save(tmp_path / f"a.{suffix}")
        with pytest.raises(ValueError, match="it is no image of a known format"):
            decode_image(tmp_path / f"a.{suffix}")


def test_a_pipe_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png' could not be decoded \(it is no regular file\)"):
        decode_image(tmp_path / "a.png")


def test_missing_image_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.png' could not be decoded .*No such file"):
        decode_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize("decode", [decode_image, image_size])
@pytest.mark.parametrize("data", [b"", b"junk" * 99, b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(9)])
def test_the_reason_of_bytes_is_the_same_in_every_process(decode, data):
    """The ledger of skips holds it: no address of an object."""
    with pytest.raises(ValueError, match=r"^image bytes could not be decoded \([a-z -]+\); replace the file or remove"):
        decode(data)
