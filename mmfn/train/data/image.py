"""Image files, decoded. What a model makes of the pixels is its family's (`mmfn.models.data`)."""

import io
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmfn.errors import UserError


def decode_image(source: str | PathLike[str] | bytes) -> Tensor:
    """An image file (path) or its bytes -> uint8[3, H, W], RGB, turned upright by its EXIF orientation.

    Raises ValueError naming the file when it is missing, truncated, no image, or holds values that 8 bits do not.
    Source: `load_image` of transformers, which clips such values at 255: a 16-bit image turns white.
    """
    name = "image bytes" if isinstance(source, bytes) else f"image {str(source)!r}"
    try:
        if not isinstance(source, bytes):
            check_regular(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode[0] in "IF" and not np.array_equal(np.asarray(image), np.asarray(image.convert("L"))):
                raise UserError(f"its {image.mode} values do not fit 8 bits, scale them to 0 ... 255")
            array = np.array(image.convert("RGB"))
    except Exception as error:  # decoders raise about anything: OSError, SyntaxError, struct.error, zlib.error
        raise UserError(f"{name} could not be decoded ({error}); replace the file or remove its sample") from error
    return torch.from_numpy(array).permute(2, 0, 1)


def check_regular(source: str | PathLike[str]) -> None:
    """Raise ValueError for a folder, pipe or device: it may never end. Missing files are left to the reader."""
    if Path(source).exists() and not Path(source).is_file():
        raise UserError("it is no regular file")
