"""A process that reads damaged and hostile media, in bounds of memory and time; run as a program by its tests.

    python -m tests.train.data.fuzz_media FOLDER FIRST NUM MIB

writes inputs of its own into FOLDER/root and reads each of them through `Dataset`, as training does. For each it prints
one line of JSON: its name, whether it became a sample, or the error's type and sentence, and what it cost.
"""

import ctypes
import io
import json
import os
import resource
import signal
import sys
import time
import warnings
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from mmfn.errors import UserError
from mmfn.models.data import qwen_omni
from mmfn.train.data import Limits
from mmfn.train.data.media import MediaReader
from mmfn.train.data.records import parse_record
from mmfn.train.data.sources.files import find_medium
from tests.train.data.clips import write_clip

IMAGES = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "jpeg2000", "ppm", "tga")
SOUNDS = ("wav", "flac", "ogg", "mp3", "aiff", "au", "caf", "w64")
CLIPS = {"mp4": "libx264", "mkv": "libx264", "avi": "mpeg4", "webm": "libvpx-vp9", "ts": "libx264", "mpg": "mpeg2video"}
LIMITS = Limits(image_pixels=2**21, audio_seconds=30.0, video_seconds=60.0, video_values=2**24)
SECONDS = 20  # for one input, at most
SECRETS = {"png": "a.png", "wav": "a.wav", "mp4": "v.mp4"}  # files outside of the root
NUM = 2000
PIXELS = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 4096}}


IN_OPEN = 0x20
NO_BYTES: Any = SimpleNamespace(medium=lambda row, name: None)
STARTS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "socket.connect")


class Config:
    positions_per_second = 13.0


def originals(folder: Path) -> dict[str, tuple[str, bytes]]:
    """By name: kind and bytes of whole files."""
    draw = np.random.default_rng(0)
    files: dict[str, tuple[str, bytes]] = {}
    for suffix in IMAGES:
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (40, 33, 3), np.uint8)).resize((99, 77)).save(buffer, suffix)
        files[f"a.{suffix}"] = "image", buffer.getvalue()
    for suffix in SOUNDS:
        buffer = io.BytesIO()
        soundfile.write(buffer, 0.1 * draw.standard_normal((4000, 2)), 44_100, format=suffix)
        files[f"a.{suffix}"] = "audio", buffer.getvalue()
    for suffix, codec in CLIPS.items():
        sound_SC = 0.1 * draw.standard_normal((8000, 1))
        more = {"sound_SC": sound_SC, "sound_rate": 16_000, "sound_codec": "mp2" if suffix in ("mpg", "ts") else "aac"}
        more = {} if suffix in ("webm", "avi") else more
        path = write_clip(folder / f"v.{suffix}", codec=codec, num=24, rate=12, movflags="faststart", **more)
        files[f"v.{suffix}"] = "video", path.read_bytes()
    return files


def damage(data: bytes, draw: np.random.Generator) -> bytes:
    """Cut off, bits flipped (half the time in the header), bytes repeated, or a field of the header at its largest."""
    out, how = bytearray(data), draw.integers(6)
    if how == 0:
        return bytes(out[: draw.integers(len(out))])
    place = int(draw.integers(len(out) if how > 2 else min(len(out), 1500)))
    if how in (1, 3):
        for spot in (place + draw.integers(0, 64, draw.integers(1, 12))) % len(out):
            out[spot] ^= 1 << draw.integers(8)
    elif how in (2, 4):
        out[place : place + 4] = (b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\0\0\0\0")[int(draw.integers(3))]
    else:
        out[place:place] = out[place : place + int(draw.integers(1, 400))]
    return bytes(out)


def bombs() -> dict[str, tuple[str, bytes]]:
    """Small files that say, or become, large things."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    def png(width: int, height: int, *more: bytes, packed: bytes = b"") -> bytes:
        head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
        body = packed or zlib.compress(bytes(1000))
        return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", head), *more, chunk(b"IDAT", body), chunk(b"IEND", b"")])

    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n%b\n#EXT-X-ENDLIST\n"
    huge = b"\xff\xff\xff\x7f" * 2
    text = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**27)))
    grey = Image.new("L", (9000, 9000))
    gif, wav = io.BytesIO(), io.BytesIO()
    grey.save(gif, "GIF")
    soundfile.write(wav, np.zeros(100), 8000, format="WAV")
    long = bytearray(wav.getvalue())
    long[40:44] = (2**31 - 2**20).to_bytes(4, "little")
    flac = io.BytesIO()
    soundfile.write(flac, np.zeros(8000 * 3000, np.int16), 8000, format="FLAC")
    return {
        "size.png": ("image", png(2**31 - 1, 2**31 - 1)),
        "packed.png": ("image", png(1400, 1400, packed=zlib.compress(bytes(2**28), 9))),
        "text.png": ("image", png(10, 10, text)),
        "wide.gif": ("image", gif.getvalue()),
        "bytes.bmp": ("image", b"BM" + bytes(8) + bytes([54, 0, 0, 0, 40, 0, 0, 0]) + huge + b"\1\0\x18\0" + bytes(24)),
        "size.ppm": ("image", b"P6 200000 200000 255\n" + bytes(100)),
        "long.wav": ("audio", bytes(long)),
        "quiet.flac": ("audio", flac.getvalue()),
        "list.m3u8": ("video", playlist % b"file:../outside/secret.mp4"),
        "list.mp4": ("video", playlist % b"../outside/secret.mp4"),
        "concat.mkv": ("video", b"ffconcat version 1.0\nfile ../outside/secret.mp4\n"),
        "image.svg": ("image", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="../outside/secret.png"/></svg>'),
        "run.eps": ("image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(../outside/secret.png) run\n"),
        "sound.m3u8": ("audio", b"#EXTM3U\n#EXTINF:1,\n../outside/secret.wav\n"),
        "empty.mp4": ("video", b""),
        "empty.png": ("image", b""),
    }


def hostile(folder: Path) -> list[tuple[str, Any]]:
    """Names that lead elsewhere, or to what is no file."""
    root, outside = folder / "root", folder / "outside"
    (root / "deep").mkdir()
    targets = {"up": folder, "loop": root / "loop", "null.png": Path("/dev/null"), "zero.mp4": Path("/dev/zero")}
    targets |= {f"link.{suffix}": outside / f"secret.{suffix}" for suffix in SECRETS}
    for name, target in targets.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe")
    secret = "outside/secret"
    names = [f"../{secret}", f"deep/../../{secret}", str(folder / secret), f"up/{secret}", f"./../{secret}", "link"]
    cases = [("image", f"{name}.png") for name in names] + [("video", f"{name}.mp4") for name in names]
    cases += [("audio", f"{name}.wav") for name in names] + [("video", [f"{name}.png"] * 2) for name in names]
    for kind in ("image", "video", "audio"):
        for name in ("/dev/zero", "/dev/stdin", "pipe", "loop", "deep", ".", "..", "null.png", "zero.mp4", "no such"):
            cases.append((kind, name))
        for name in ("", "\0", "a\0b", "~/x", "%2e%2e/x", "C:\\x", "\\\\host\\x", "http://localhost/x.png"):
            cases.append((kind, name))
        for name in ("file:///etc/hostname", "data:image/png;base64,AAAA", "concat:a|b", "subfile,,start,0,end,9,,:a"):
            cases.append((kind, name))
        cases += [(kind, "x" * 5000), (kind, "\ud800"), (kind, 7), (kind, None), (kind, {}), (kind, [[]]), (kind, [])]
    return cases


def cases(folder: Path) -> list[tuple[str, str, Any, bytes | None]]:
    """2,000 of `(label, kind, name, bytes)`, always the same: bombs, hostile names, then damaged files."""
    whole = originals(folder)
    for suffix, name in SECRETS.items():
        (folder / "outside" / f"secret.{suffix}").write_bytes(whole[name][1])
    out: list[tuple[str, str, Any, bytes | None]] = [(n, kind, n, data) for n, (kind, data) in bombs().items()]
    out += [(repr(name)[:60], kind, name, None) for kind, name in hostile(folder)]
    draw, names = np.random.default_rng(1), list(whole)
    while len(out) < NUM:
        name = names[int(draw.integers(len(names)))]
        kind, data = whole[name]
        kind = "audio" if kind == "video" and draw.random() < 0.15 else kind
        out.append((f"{len(out)} {name}", kind, f"d{name}", damage(data, draw)))
    return out


def attempt(reader: MediaReader, find: Any, kind: str, name: Any, *, is_heard: bool) -> None:
    part = {"type": kind, kind: name} | ({"use_audio_in_video": is_heard} if kind == "video" else {})
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]
    record = parse_record({"messages": turns}, "0")
    reader.measure(record, find)
    (medium,) = reader.read(record, find)[kind]
    assert bool(torch.isfinite(medium.inputs_UF).all())


class Opened:
    """Counts how often the files of a folder are opened, by whatever code (Linux's inotify)."""

    def __init__(self, folder: Path) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.handle = self.libc.inotify_init1(os.O_NONBLOCK)
        assert self.libc.inotify_add_watch(self.handle, os.fsencode(folder), IN_OPEN) >= 0

    def count(self) -> int:
        """Since the last call."""
        try:
            return len(os.read(self.handle, 2**16))
        except BlockingIOError:
            return 0


def peak_kib() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def main(folder: Path, first: int, num: int, mib: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    root = folder / "root"
    for name in ("root", "outside"):
        (folder / name).mkdir()
    todo = cases(folder)[first : first + num]
    sections = {"image_processor": PIXELS, "video_processor": PIXELS, "feature_extractor": {}}
    reader = MediaReader(qwen_omni.processor(sections, Config()), limits=LIMITS)
    find = partial(find_medium, NO_BYTES, 0, root=root.resolve())
    started: list[str] = []
    sys.addaudithook(lambda event, _: started.append(event) if event in STARTS else None)
    opened = Opened(folder / "outside")
    (folder / "outside" / "secret.png").read_bytes()
    assert opened.count() > 0  # it sees
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("too long")))
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here
    before = peak_kib()
    resident = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (resident + mib * 2**20, -1))
    for place, (label, kind, name, data) in enumerate(todo, start=first):
        if data is not None:
            (root / name).write_bytes(data)
        start, row = time.perf_counter(), {"label": label, "kind": kind, "is_read": True}
        signal.alarm(SECONDS)
        try:
            attempt(reader, find, kind, name, is_heard=bool(place % 2))
        except UserError as error:
            row |= {"is_read": False, "sentence": str(error)}
        except BaseException as error:
            row |= {"is_read": False, "fault": f"{type(error).__name__}: {error}"[:300]}
        signal.alarm(0)
        row |= {"seconds": round(time.perf_counter() - start, 3), "outside": opened.count(), "started": started}
        print(json.dumps(row), flush=True)
    print(json.dumps({"grown_kib": peak_kib() - before}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
