"""Damaged media: each is decoded or refused by one sentence of ours, and costs no more memory than the limits say."""

import io
import resource
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmfn.errors import UserError
from mmfn.train.data import Limits, decode_audio, decode_image

LIMITS = Limits(image_pixels=2**20, audio_seconds=10.0)
IMAGES = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "jpeg2000", "ppm", "tga")
SOUNDS = ("wav", "flac", "ogg", "mp3", "aiff", "au", "caf", "w64")
NUM = 30  # of each format


def originals() -> dict[str, bytes]:
    draw = np.random.default_rng(0)
    files = {}
    for kind in IMAGES:
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (40, 33, 3), np.uint8)).resize((99, 77)).save(buffer, kind)
        files[kind] = buffer.getvalue()
    for kind in SOUNDS:
        buffer = io.BytesIO()
        soundfile.write(buffer, 0.1 * draw.standard_normal((4000, 2)), 44_100, format=kind)
        files[kind] = buffer.getvalue()
    return files


def damage(data: bytes, draw: np.random.Generator) -> bytes:
    """Cut off, bits flipped (half the time in the header), bytes repeated, or a field of the header at its largest."""
    out = bytearray(data)
    how = draw.integers(5)
    if how == 0:
        return bytes(out[: draw.integers(len(out))])
    place = int(draw.integers(len(out) if how > 2 else min(len(out), 64)))
    if how in (1, 3):
        for spot in (place + draw.integers(0, 32, draw.integers(1, 8))) % len(out):
            out[spot] ^= 1 << draw.integers(8)
    elif how == 2:
        out[place : place + 4] = b"\xff\xff\xff\x7f"
    else:
        out[place:place] = out[place : place + int(draw.integers(1, 200))]
    return bytes(out)


def attempt(path: Path, kind: str) -> bool:
    """Whether it decoded. Anything but one sentence that names the file propagates."""
    try:
        if kind in IMAGES:
            image_u8 = decode_image(path, LIMITS)
            assert image_u8.shape[1] * image_u8.shape[2] <= LIMITS.image_pixels
        else:
            assert decode_audio(path, 16_000, LIMITS).numel() <= 16_000 * LIMITS.audio_seconds + 1
    except UserError as error:
        sentence = str(error)
    else:
        return True
    assert str(path) in sentence
    assert "\n" not in sentence
    return False


@pytest.mark.parametrize("kind", [*IMAGES, *SOUNDS])
@pytest.mark.filterwarnings("ignore")  # of Pillow, for files that are odd but readable
def test_damaged_files_are_decoded_or_refused(tmp_path, kind):
    data, path = originals()[kind], tmp_path / f"a.{kind}"
    path.write_bytes(data)
    assert attempt(path, kind)
    draw = np.random.default_rng(len(data))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for _ in range(NUM):
        path.write_bytes(damage(data, draw))
        refused += not attempt(path, kind)
    assert refused >= 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB
