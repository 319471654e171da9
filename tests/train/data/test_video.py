import numpy as np
import pytest
import torch
from PIL import Image

from mmfn.models.data import Sampling
from mmfn.train.data.video import decode_frames, decode_video

SAMPLING = Sampling(fps=2.0, select=lambda num_frames, rate: [0, 5, 9, 14, 18, num_frames - 1])


def pixels(*shape):
    """uint8[T, 3, H, W]: edges and ramps."""
    t, c, y, x = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    return ((x * x // 3 + 5 * y + 37 * c + x * y // 7 + 11 * t * x) % 256).to(torch.uint8)


def test_frames_from_images(tmp_path):
    frames = pixels(3, 3, 6, 8)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, frame in zip(paths, frames, strict=True):
        Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(path)
    decoded, times = decode_frames(paths, SAMPLING.fps)
    assert torch.equal(decoded, frames)
    assert times == [0.0, 0.5, 1.0]
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(paths[1])
    with pytest.raises(ValueError, match=r"must have one size, got \[\(6, 8\), \(6, 9\)\]"):
        decode_frames(paths, SAMPLING.fps)


def test_missing_pyav_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match=r"clip\.mp4' needs PyAV to be decoded; install it"):
        decode_video(tmp_path / "clip.mp4", SAMPLING)


def _write_clip(av, path, num_frames, rate):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(num_frames):
            array = np.zeros((48, 64, 3), np.uint8)
            array[:, 2 * index : 2 * index + 8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def test_decoding_a_file(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is an optional dependency")
    path = tmp_path / "clip.mp4"
    _write_clip(av, path, 24, 8)
    frames, times, rate = decode_video(path, SAMPLING)
    with av.open(str(path)) as container:
        everything = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert times == [i / 8 for i in (0, 5, 9, 14, 18, 23)]
    assert rate == 6 / 3  # frames that were read per second
    assert torch.equal(frames, torch.from_numpy(everything[[0, 5, 9, 14, 18, 23]]).permute(0, 3, 1, 2))


def test_broken_video_files(tmp_path):
    pytest.importorskip("av", reason="PyAV is an optional dependency")
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"nothing")
    for source in (path, tmp_path / "missing.mp4"):
        with pytest.raises(ValueError, match=rf"{source.name}' could not be decoded"):
            decode_video(source, SAMPLING)
