"""Handwritten digits that move, as questions about videos: real images, clips of them, and a tiny model.

    python examples/moving_digits.py OUT

moves scikit-learn's digits (8x8 pixels) over a canvas of 16x16, 2 pixels a frame to the left, right, up or down, round
its borders and from a random place, so that no single frame tells the direction: 4,000 clips of the digits of
`digits.py`'s training split, 360 of the held-out ones (one each), as lossless AVI files of 8 frames at 2 a second. It
writes them, `train.json` and `eval.json` in the messages/videos format, and the `model/` of `digits.py`. Running it
again writes the same bytes.

    mmfn train configs/demo-video.yaml       # or all of it: make demo-video

trains 400 steps in two to three minutes on one core: held-out accuracy 1.000 (360 of 360; chance is 0.25).
"""

import argparse
import sys
from pathlib import Path

import av
import numpy as np
import torch
from digits import NUM_TRAIN, write_json, write_model
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from mmfn import rng

NUM_CLIPS, NUM_FRAMES, CANVAS, STEP, RATE = 4000, 8, 16, 2, 2
QUESTION = "<video>Where does the digit move?"
DIRECTIONS = {"left": (0, -STEP), "right": (0, STEP), "up": (-STEP, 0), "down": (STEP, 0)}  # rows, columns a frame


def write_demo(out: Path) -> None:
    """Write clips, both datasets and the model folder under `out`, which is created."""
    digits = load_digits().images * (255 / 16)
    order = rng.permutation(len(digits), 0, "digits")  # that of digits.py
    g = rng.generator(0, "moving digits")
    drawn = torch.randint(NUM_TRAIN, (NUM_CLIPS,), generator=g).tolist()
    for name, chosen in (("train", [order[i] for i in drawn]), ("eval", order[NUM_TRAIN:])):
        (out / name).mkdir(parents=True, exist_ok=True)
        entries = []
        for number, index in enumerate(chosen):
            way, row, column = (int(torch.randint(n, (), generator=g)) for n in (len(DIRECTIONS), CANVAS, CANVAS))
            answer = list(DIRECTIONS)[way]
            file = f"{name}/{number:04d}.avi"
            write_clip(out / file, clip(digits[index].astype(np.uint8), answer, (row, column)))
            messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
            entries.append({"id": f"{name}-{number:04d}", "messages": messages, "videos": [file]})
        write_json(out / f"{name}.json", entries)
    write_model(out / "model")


def clip(digit: NDArray[np.uint8], direction: str, start: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8[frame, row, column]: the digit at `start`, then a step further in every frame, round the borders."""
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)
    canvas[: digit.shape[0], : digit.shape[1]] = digit
    rows, columns = DIRECTIONS[direction]
    places = [(start[0] + t * rows, start[1] + t * columns) for t in range(NUM_FRAMES)]
    return np.stack([np.roll(canvas, place, (0, 1)) for place in places])


def write_clip(path: Path, frames: NDArray[np.uint8]) -> None:
    """A video file of grey frames, without loss."""
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = CANVAS, CANVAS, "bgr0"
        stream.codec_context.flags |= 1 << 23  # bitexact: no version of the encoder in the file
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.repeat(pixels[..., None], 3, axis=2), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path, help="folder to write, for example build/demo-video")
    out = parser.parse_args().out
    try:
        write_demo(out)
    except OSError as error:
        sys.exit(f"moving_digits.py: error: cannot write {str(out)!r} ({error}); give a folder that can be written")
    print(f"data: {out / 'train.json'}, {out / 'eval.json'}; model: {out / 'model'}")
