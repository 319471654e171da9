"""Image files, decoded. What a model makes of the pixels is its family's (`mmfn.models.data`)."""

import io
from os import PathLike

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmfn.errors import UserError
from mmfn.train.limits import LIMITS, Limits, check_regular

# Formats that Pillow decodes itself and whose size it knows before. EPS runs Ghostscript, a program; what is in ICO
# may be larger than it says; some of the others are mere stubs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", "TGA")
WHITE = (255, 255, 255, 255)


def decode_image(source: str | PathLike[str] | bytes, limits: Limits = LIMITS) -> Tensor:
    """An image file (path) or its bytes -> uint8[3, H, W], RGB, turned upright by its EXIF orientation.

    Transparent pixels are seen on white, as a viewer shows them: their hidden colours are often black, like the text
    on them. Of animations and files with pages it is the first. 16-bit grey of a PNG file loses its lower 8 bits, as
    16-bit colours do. Raises ValueError naming the file when it is missing, truncated, no image, larger than
    `limits.image_pixels`, or holds values that 8 bits do not.

    Source: of transformers 5.23 `load_image`, which clips at 255 (a 16-bit image turns white) and shows hidden colours,
    with `convert_to_rgb`, the step of its processors that mends the latter.
    """
    name = "image bytes" if isinstance(source, bytes) else f"image {str(source)!r}"
    try:
        if not isinstance(source, bytes):
            check_regular(source)
        Image.init()  # all formats, of which some may be missing in this build
        formats = [one for one in FORMATS if one in Image.OPEN]
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as opened:
            limits.check_image(*opened.size)
            image = ImageOps.exif_transpose(opened)
            if image.mode[0] in "IF":
                image = _grey(image, is_png=opened.format == "PNG")
            array = np.array(_on_white(image))
    except Exception as error:  # decoders raise about anything: OSError, SyntaxError, struct.error, zlib.error
        raise UserError(f"{name} could not be decoded ({error}); replace the file or remove its sample") from error
    return torch.from_numpy(array).permute(2, 0, 1)


def _grey(image: Image.Image, *, is_png: bool) -> Image.Image:
    """Of 16 or 32 bits to 8. Only PNG says what value is white: 65535; of other files it is unknown."""
    values = np.asarray(image)
    if is_png:
        return Image.fromarray((values >> 8).astype(np.uint8))
    grey = image.convert("L")
    if not np.array_equal(values, np.asarray(grey)):
        raise UserError(f"its {image.mode} values do not fit 8 bits, scale them to 0 ... 255")
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    """RGB."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image.convert("RGBA")).convert("RGB")
