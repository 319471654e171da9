"""Pixels to patches in plain torch: resizing and cutting. A processor of a checkpoint says how.

Patches are bytes, with the `Levels` by which they are normalised on the device. The numbers then equal those of
transformers' `Qwen2VLImageProcessor` (torchvision backend) bit for bit, without torchvision.
Legend: P patches, F values of one patch (3 * temporal_patch_size * patch_size**2), H and W height and width in pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfn.batch import Levels, Media
from mmfn.errors import UserError

MAX_ASPECT_RATIO = 200  # the library refuses longer strips, and so does a vision tower trained with it
BICUBIC = 3  # PIL's number of the filter, as written in preprocessor_config.json
CHANNELS = 3  # of every decoded image


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How pixels become patches.

    `patch_size`: pixels per patch side. `temporal_patch_size`: frames per patch (an image is repeated). `merge_size`:
    patches per side that become one token. `min_pixels`, `max_pixels`: budget of one image, or of all frames of one
    video. `mean`, `std`: per channel, of values in [0, 1]. `shape`: height and width that the budget takes a picture to
    have; None: its own.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} of an image processor must be a positive integer, got {value!r}; correct it")
        if self.shape is not None and not all(type(side) is int and side > 0 for side in self.shape):
            raise UserError(
                f"resized_height and resized_width must be positive integers, got {self.shape}; correct them"
            )
        if self.min_pixels > self.max_pixels:
            raise UserError(
                f"an image processor has min_pixels {self.min_pixels} above max_pixels {self.max_pixels}; swap them"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(v, float) and math.isfinite(v) for v in values):
                raise UserError(f"{name} of an image processor must be 3 finite floats, got {values!r}")
        if 0.0 in self.std:
            raise UserError(f"std of an image processor must not be zero, got {self.std!r}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> "ImageSpec":
        """The spec of a `preprocessor_config.json` (or of the video processor's).

        `defaults`: what a family takes for absent keys (`patch_size`, `temporal_patch_size`, `merge_size`, `size`,
        `image_mean`, `image_std`). Raises ValueError for half a pixel budget, a wrong type, or a switch that asks for
        other maths (`do_resize: false`, another `resample`, ...): nothing is ignored silently.
        """
        for name, only in _FIXED.items():
            if config.get(name, only) != only:
                raise UserError(f"image processor option {name!r} is {config[name]!r}, only {only!r} is supported")
        size = config.get("size") or defaults["size"]
        if not isinstance(size, Mapping):
            raise UserError(f"image processor option 'size' must be a dict, got {size!r}")
        low = _first(config.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels"))
        high = _first(config.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels"))
        if low is None or high is None:
            raise UserError(f"image processor option 'size' needs shortest_edge and longest_edge, got {dict(size)!r}")
        values = {**defaults, **config}
        return cls(
            patch_size=values["patch_size"],
            temporal_patch_size=values["temporal_patch_size"],
            merge_size=values["merge_size"],
            min_pixels=low,
            max_pixels=high,
            mean=_channels("image_mean", values["image_mean"]),
            std=_channels("image_std", values["image_std"]),
        )

    def with_settings(self, settings: Mapping[str, Any]) -> "ImageSpec":
        """With `min_pixels` and `max_pixels`, and `resized_height` and `resized_width` in place of a picture's own.

        One bound alone moves the other along where they cross. Raises ValueError for one side without the other, and
        for values out of range.
        """
        sides = [settings[name] for name in ("resized_height", "resized_width") if name in settings]
        if len(sides) == 1:
            raise UserError("resized_height and resized_width belong together; set both or none")
        bounds = {name: settings[name] for name in ("min_pixels", "max_pixels") if name in settings}
        if bounds.get("max_pixels", self.min_pixels) < self.min_pixels:
            bounds.setdefault("min_pixels", bounds["max_pixels"])
        if "min_pixels" in bounds:
            bounds["min_pixels"] = max(1, bounds["min_pixels"])  # no bound
        if bounds.get("min_pixels", self.max_pixels) > self.max_pixels:
            bounds.setdefault("max_pixels", bounds["min_pixels"])
        return replace(self, **bounds, shape=tuple(sides) if sides else self.shape)

    def to_hf(self) -> dict[str, Any]:
        """The section that `from_hf` reads."""
        return {
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    @property
    def patch_values(self) -> int:
        """F: values of one flattened patch."""
        return CHANNELS * self.temporal_patch_size * self.patch_size**2


_FIXED = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": BICUBIC,
    "rescale_factor": 1 / 255,
}


def preprocess_image(image_u8: Tensor, spec: ImageSpec, num_frames: int | None = None) -> Media:
    """uint8[3, H, W] -> `Media` of bytes, with grid (1, height, width) in patches.

    `num_frames`: as a video of how many frames the pixel budget counts it, in families that do (see `target_size`).
    Raises ValueError for another shape or dtype, or an aspect ratio above 200.
    Source: Qwen2VLImageProcessor of transformers 5.23.0, bit-equal to its torchvision backend.
    """
    if image_u8.ndim != 3 or image_u8.shape[0] != 3 or image_u8.dtype != torch.uint8:
        raise UserError(f"an image must be uint8[3, H, W], got {image_u8.dtype} {tuple(image_u8.shape)}")
    size = target_size(image_u8.shape[1], image_u8.shape[2], spec, num_frames)
    return patchify(resize(image_u8[None], size), spec)


def target_size(height: int, width: int, spec: ImageSpec, num_frames: int | None = None) -> tuple[int, int]:
    """Height and width in pixels to resize to: multiples of patch_size * merge_size inside the pixel budget.

    With `num_frames` the budget is that of a video. Raises ValueError when one side is over 200 times the other.
    Source: the `smart_resize` functions of transformers 5.23.0 (qwen2_vl; qwen3_vl and glm4v).
    """
    factor = spec.patch_size * spec.merge_size
    height, width = spec.shape or (height, width)
    frames = budget_frames = 1
    if num_frames is not None:
        frames = num_frames
        budget_frames = round(num_frames / spec.temporal_patch_size) * spec.temporal_patch_size
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise UserError(
            f"an image of {height} x {width} pixels is longer than {MAX_ASPECT_RATIO} times its width; crop or split it"
        )
    # Python's round: halves go to the even neighbour, here as in the library
    new_height, new_width = (round(side / factor) * factor for side in (height, width))
    if budget_frames * new_height * new_width > spec.max_pixels:
        shrink = math.sqrt(frames * height * width / spec.max_pixels)
        new_height, new_width = (max(factor, math.floor(s / shrink / factor) * factor) for s in (height, width))
    elif budget_frames * new_height * new_width < spec.min_pixels:
        grow = math.sqrt(spec.min_pixels / (frames * height * width))
        new_height, new_width = (math.ceil(s * grow / factor) * factor for s in (height, width))
    return new_height, new_width


def resize(frames_u8: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8[T, 3, H, W] -> uint8[T, 3, *size], antialiased bicubic computed in uint8 as torchvision does.

    Where channels lie last in memory, as decoders leave them, they do so in the result.
    """
    if frames_u8.shape[-2:] == size:
        return frames_u8
    if len(frames_u8) == 1:  # by the stride of this dim torch tells that channels lie last
        frames_u8 = frames_u8[0].permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(frames_u8, size, mode="bicubic", antialias=True, align_corners=False)


def patchify(frames_u8: Tensor, spec: ImageSpec) -> Media:
    """uint8[T, 3, H, W] -> `Media` of patches; T is a multiple of temporal_patch_size, or 1: an image, which is
    repeated.

    Patch order: time, block row, block column, row, column (merge blocks stay together); values: channel, time, y, x.
    """
    p, m, num = spec.patch_size, spec.merge_size, spec.temporal_patch_size
    T, C, H, W = frames_u8.shape
    t = min(T, num)
    grid = (T // t, H // p, W // p)
    x = frames_u8.reshape(grid[0], t, C, grid[1] // m, m, p, grid[2] // m, m, p)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), C, 1, t * p * p)
    inputs_UF = x.expand(-1, -1, num // t, -1).reshape(math.prod(grid), spec.patch_values)
    return Media(inputs_UF=inputs_UF, grid=grid, levels=Levels(mean=spec.mean, std=spec.std))


def _channels(name: str, values: Any) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(v) for v in values)
    except (TypeError, ValueError):
        raise UserError(f"image processor option {name!r} must be 3 numbers, got {values!r}") from None
    return red, green, blue


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)
