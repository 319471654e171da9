"""Pictures in a page that needs no other file."""

import base64
import io
from pathlib import Path

from PIL import Image

THUMBNAIL_PIXELS = 256  # longest side of an embedded image
TINY_PIXELS = 64  # images below this are shown as crisp pixels


def data_url(source: Path | bytes) -> str:
    """An image as a PNG in a data URL. Small PNG files stay as they are, anything else becomes a thumbnail.

    Raises OSError for what cannot be read.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if is_tiny(image) and image.format == "PNG":
            data = source if isinstance(source, bytes) else source.read_bytes()
        else:
            data = _thumbnail(image)
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def is_tiny(image: Image.Image) -> bool:
    """Whether its pixels are to be seen one by one."""
    return max(image.size) <= TINY_PIXELS


def _thumbnail(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
