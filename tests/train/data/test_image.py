import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from mmfn.train.data.image import decode_image


def pixels(height, width):
    """uint8[3, H, W]: edges and ramps."""
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(height), torch.arange(width), indexing="ij")
    return ((x * x // 3 + 5 * y + 37 * c + x * y // 7) % 256).to(torch.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_follows_exif(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(pixels(5, 9).permute(1, 2, 0).contiguous().numpy()).save(path, exif=exif)
    expected = torch.from_numpy(np.array(load_image(str(path)))).permute(2, 0, 1)
    assert torch.equal(decode_image(path), expected)
    assert torch.equal(decode_image(path.read_bytes()), expected)
    assert decode_image(path).shape == ((3, 9, 5) if orientation > 4 else (3, 5, 9))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_decode_converts_every_mode_as_the_library_does(tmp_path, mode):
    source = Image.fromarray(pixels(6, 7).permute(1, 2, 0).contiguous().numpy())
    image = Image.fromarray(np.arange(42, dtype=np.uint16).reshape(6, 7)) if mode == "I;16" else source.convert(mode)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path)
    expected = torch.from_numpy(np.array(load_image(str(path)))).permute(2, 0, 1)
    assert torch.equal(decode_image(path), expected)
    assert decode_image(path).dtype == torch.uint8


@pytest.mark.parametrize("content", [b"", b"no image at all", "truncated"])
def test_broken_image_is_one_sentence(tmp_path, content):
    if content == "truncated":
        buffer = io.BytesIO()
        Image.fromarray(pixels(50, 50).permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
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


def test_a_pipe_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png' could not be decoded \(it is no regular file\)"):
        decode_image(tmp_path / "a.png")


def test_missing_image_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.png' could not be decoded .*No such file"):
        decode_image(tmp_path / "nowhere.png")
