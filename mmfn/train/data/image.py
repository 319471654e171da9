"""Image files, decoded. What a model makes of the pixels is its family's (`mmfn.models.data`)."""

import io
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mmfn.errors import UserError
from mmfn.train.limits import LIMITS, Limits, check_regular

# Formats that Pillow decodes itself and whose size it knows before. EPS runs Ghostscript, a program; what is in ICO
# may be larger than it says; some of the others are mere stubs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", "TGA")
WHITE = (255, 255, 255, 255)
ORIENTATION, ACROSS = 0x0112, (5, 6, 7, 8)  # the tag of EXIF, and its values that swap height and width
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LATE = frozenset((b"eXIf", b"iTXt", b"zTXt", b"tEXt"))


def decode_image(source: str | PathLike[str] | bytes, limits: Limits = LIMITS) -> Tensor:
    """An image file (path) or its bytes -> uint8[3, H, W], RGB, turned upright by its EXIF orientation.

    Transparent pixels are seen on white, as a viewer shows them: their hidden colours are often black, like the text
    on them. Of animations and files with pages it is the first. 16-bit grey of a PNG file loses its lower 8 bits, as
    16-bit colours do. Raises ValueError naming the file when it is missing, truncated, no image, larger than
    `limits.image_pixels`, or holds values that 8 bits do not.

    Source: of transformers 5.23 `load_image`, which clips at 255 (a 16-bit image turns white) and shows hidden colours,
    with `convert_to_rgb`, the step of its processors that mends the latter.
    """
    try:
        with _open(source, limits) as opened:
            ImageOps.exif_transpose(opened, in_place=True)
            image = _grey(opened, is_png=opened.format == "PNG") if opened.mode[0] in "IF" else opened
            array = np.array(_on_white(image))
    except Exception as error:  # decoders raise about anything: OSError, SyntaxError, struct.error, zlib.error
        raise _failure(source, error) from error
    return torch.from_numpy(array).permute(2, 0, 1)


def image_size(source: str | PathLike[str] | bytes, limits: Limits = LIMITS) -> tuple[int, int]:
    """Height and width that `decode_image` gives, by the header alone where that tells the orientation.

    Raises ValueError as `decode_image` does, but for what only decoding finds out.
    """
    try:
        with _open(source, limits) as opened:
            width, height = opened.size  # of TIFF files it is that of the picture turned upright
            if opened.format == "PNG" and not _has_late_text(opened):
                orientation = Image.Image.getexif(opened).get(ORIENTATION)  # PNG's own decodes all to find late ones
            else:
                orientation = opened.getexif().get(ORIENTATION)
            is_turned = orientation in ACROSS and opened.format != "TIFF"
    except Exception as error:
        raise _failure(source, error) from error
    return (width, height) if is_turned else (height, width)


def _failure(source: str | PathLike[str] | bytes, error: Exception) -> UserError:
    name = "image bytes" if isinstance(source, bytes) else f"image {str(source)!r}"
    # Pillow's own sentence has the address of bytes: the reason of a skip would be another in each process
    is_unknown = isinstance(error, UnidentifiedImageError)
    reason = "it is no image of a known format" if is_unknown else error
    return UserError(f"{name} could not be decoded ({reason}); replace the file or remove its sample")


def _open(source: str | PathLike[str] | bytes, limits: Limits) -> Any:
    """The file with its header read. Raises ValueError for one beyond the limit."""
    check_regular(source)
    Image.init()  # all formats, of which some may be missing in this build
    formats = [one for one in FORMATS if one in Image.OPEN]
    opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    try:
        limits.check_image(*opened.size)
    except UserError:
        opened.close()
        raise
    return opened


def _has_late_text(opened: Any) -> bool:
    """Whether a PNG file has anything but its end behind the pixels: it might say the orientation."""
    file, place = opened.fp, opened.fp.tell()
    file.seek(len(PNG_SIGNATURE))
    kinds: list[bytes] = []
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        kinds.append(head[4:])
        file.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
    file.seek(place)
    return b"IDAT" in kinds and not LATE.isdisjoint(kinds[kinds.index(b"IDAT") :])


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
        return image if image.mode == "RGB" else image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image.convert("RGBA")).convert("RGB")
