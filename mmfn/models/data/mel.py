"""Sound to log-mel frames in plain torch. Legend: S samples, U frames, F mel bins, N frequencies.

The numbers equal those of transformers' `WhisperFeatureExtractor` for a clip on its own, bit for bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmfn.errors import UserError

HIGHEST_HZ, FLOOR, RANGE = 8000.0, 1e-10, 8.0  # of the filters; of a power; in powers of ten, below a clip's loudest
LINEAR_BELOW_HZ, HZ_PER_MEL, PER_OCTAVES = 1000.0, 200.0 / 3.0, 27.0 / math.log(6.4)  # of Slaney's mel scale
_FIXED = {"dither": 0.0, "padding_value": 0.0, "do_normalize": False}


@dataclass(frozen=True, kw_only=True)
class SoundSpec:
    """How sound becomes frames: `rate` samples per second, a frame every `hop` samples, from `width` samples each."""

    num_mels: int
    rate: int
    hop: int
    width: int

    def __post_init__(self) -> None:
        for name in ("num_mels", "rate", "hop", "width"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name} of a feature extractor must be a positive integer, got {value!r}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> "SoundSpec":
        """The spec of a feature extractor's settings (`feature_size`, `sampling_rate`, `hop_length`, `n_fft`).

        `defaults`: what a family takes for absent keys. Raises ValueError for a wrong type, and for settings that ask
        for other maths (`dither`, ...).
        """
        for name, only in _FIXED.items():
            if config.get(name, only) != only:
                raise UserError(f"feature extractor option {name!r} is {config[name]!r}, only {only!r} is supported")
        values = {**defaults, **config}
        return cls(
            num_mels=values["feature_size"],
            rate=values["sampling_rate"],
            hop=values["hop_length"],
            width=values["n_fft"],
        )


def log_mel(wave_S: Tensor, spec: SoundSpec) -> Tensor:
    """float32[S], values in [-1, 1] -> float32[U, F], U = S // hop.

    Power at each frequency, in triangles of Slaney's mel scale up to 8 kHz, as its logarithm; what is more than 80 dB
    below the clip's loudest value is raised to there. Raises ValueError for another shape or dtype, values that are not
    finite, and a clip too short for one frame.
    """
    if wave_S.ndim != 1 or wave_S.dtype != torch.float32:
        raise UserError(f"sound must be float32[S], got {wave_S.dtype} {tuple(wave_S.shape)}; mix it to one channel")
    if wave_S.numel() < (least := max(spec.hop, spec.width // 2 + 1)):
        raise UserError(f"a clip needs at least {least} samples at {spec.rate} Hz, got {wave_S.numel()}; leave it out")
    if wave_S.is_meta:
        return wave_S.new_empty(wave_S.numel() // spec.hop, spec.num_mels)
    window = torch.hann_window(spec.width)
    waves = torch.stft(wave_S[None], spec.width, spec.hop, window=window, return_complex=True)[..., :-1]
    mels = _filters(spec.num_mels, spec.width, spec.rate).T @ _powers(waves)
    logs = mels.clamp(min=FLOOR).log10()
    highest = logs.amax()
    if not bool(highest.isfinite()):
        raise UserError("a clip holds values that are not finite; repair it")
    logs = torch.maximum(logs, highest - RANGE)
    return ((logs + 4.0) / 4.0)[0].T.contiguous()


def _powers(waves_1NU: Tensor) -> Tensor:
    """The bits of `waves.abs() ** 2`, contiguous, in half the time: of complex numbers torch works sizes out twice.

    Both take the same vectorised hypot, if what it reads is contiguous.
    """
    real_1UN, imaginary_1UN = torch.view_as_real(waves_1NU.mT).movedim(-1, 0).contiguous()
    sizes_1UN = torch.hypot(real_1UN, imaginary_1UN)
    return sizes_1UN.mul_(sizes_1UN).mT.contiguous()


@lru_cache(maxsize=8)
def _filters(num_mels: int, width: int, rate: int) -> Tensor:
    """float32[N, F]: triangles between neighbouring mels, of equal area. Shared between calls: never written.

    Worked out in float64. Source: `mel_filter_bank` of transformers 5.23 (`norm` and `mel_scale` "slaney").
    """
    highest = LINEAR_BELOW_HZ / HZ_PER_MEL + math.log(HIGHEST_HZ / LINEAR_BELOW_HZ) * PER_OCTAVES
    edges = _hertz(_evenly(highest, num_mels + 2))
    slopes = edges - _evenly(rate // 2, 1 + width // 2)[:, None]
    rising, falling = -slopes[:, :-2] / edges.diff()[:-1], slopes[:, 2:] / edges.diff()[1:]
    triangles = torch.minimum(rising, falling).clamp(min=0) * (2.0 / (edges[2:] - edges[:-2]))
    return triangles.float()


def _evenly(last: float, num: int) -> Tensor:
    """float64[num] from 0 to `last`."""
    return torch.arange(num, dtype=torch.float64) * (last / (num - 1))


def _hertz(mels: Tensor) -> Tensor:
    first = LINEAR_BELOW_HZ / HZ_PER_MEL  # mel from which on it is logarithmic
    above = LINEAR_BELOW_HZ * torch.exp((mels.clamp(min=first) - first) / PER_OCTAVES)
    return torch.where(mels >= first, above, HZ_PER_MEL * mels)
