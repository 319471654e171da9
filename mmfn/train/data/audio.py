"""Sound files, decoded. What a model makes of the samples is its family's (`mmfn.models.data`). Legend: S samples."""

import wave
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from mmfn.errors import UserError
from mmfn.train.data.image import check_regular

WIDTH, FULL = 2, 2.0**15  # bytes of a sample, and the value that is 1


def decode_audio(source: str | PathLike[str]) -> tuple[Tensor, int]:
    """A WAV file of 16-bit samples -> (float32[S] in [-1, 1), the mean of its channels; samples per second).

    Raises ValueError naming the file when it is missing, truncated, or holds anything else.
    """
    try:
        check_regular(source)
        with wave.open(str(source), "rb") as file:
            if file.getsampwidth() != WIDTH:
                raise UserError(f"its samples have {8 * file.getsampwidth()} bits, convert it to 16")
            num, channels, rate = file.getnframes(), file.getnchannels(), file.getframerate()
            data = file.readframes(num)
        if len(data) != num * channels * WIDTH:
            raise UserError("it is truncated")
    except (OSError, EOFError, wave.Error, UserError) as error:
        raise UserError(
            f"sound {str(source)!r} could not be decoded ({error}); give a WAV file of 16-bit samples"
        ) from error
    samples = torch.from_numpy(np.frombuffer(data, dtype="<i2").astype(np.float32))
    return samples.view(-1, channels).mean(1) / FULL, rate
