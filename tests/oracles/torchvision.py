"""What transformers' processors of images and videos call of torchvision, whose wheel does not load here, in its place.

Resizing is torch's own (torchvision calls the same), so that the library's processors run in full: sizes, order of
frames, patches, grids. `tests/goldens/media.json` holds what they give with torchvision itself.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

MODES = SimpleNamespace(NEAREST="nearest", BILINEAR="bilinear", BICUBIC="bicubic", LANCZOS="lanczos")


def resize(image: Tensor, size: Any, interpolation: str, antialias: bool) -> Tensor:
    flat = image.reshape(-1, *image.shape[-3:])
    if tuple(flat.shape[-2:]) != tuple(size):
        flat = interpolate(flat, tuple(size), mode=interpolation, antialias=antialias, align_corners=False)
    return flat.reshape(*image.shape[:-2], *size)


def normalize(image: Tensor, mean: Any, std: Any, inplace: bool = False) -> Tensor:
    mean, std = (torch.as_tensor(x, dtype=image.dtype).view(-1, 1, 1) for x in (mean, std))
    return image.sub(mean).div_(std)


_STAND_IN = SimpleNamespace(
    InterpolationMode=MODES, resize=resize, normalize=normalize, grayscale_to_rgb=lambda image: image
)


@contextmanager
def in_place_of_torchvision() -> Iterator[None]:
    from transformers import image_processing_backends, video_processing_utils

    names = {"tvF": _STAND_IN, "pil_torch_interpolation_mapping": {3: MODES.BICUBIC}}
    missing = object()
    before = [
        (module, name, getattr(module, name, missing))
        for module in (image_processing_backends, video_processing_utils)
        for name in names
    ]
    for module, name, _ in before:
        setattr(module, name, names[name])
    try:
        yield
    finally:
        for module, name, value in before:
            if value is missing:
                delattr(module, name)
            else:
                setattr(module, name, value)


def library_class(name: str) -> Any:
    """A class of transformers whose module imports torchvision: "qwen2_vl.video_processing_qwen2_vl.ClassName"."""
    module, name = name.rsplit(".", 1)
    parts = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    stubs: dict[str, Any] = {part: ModuleType(part) for part in parts}
    for part in parts[1:]:
        setattr(stubs[part.rpartition(".")[0]], part.rpartition(".")[2], stubs[part])
    stubs[parts[-1]].functional = stubs[f"{parts[-1]}.functional"] = _STAND_IN
    added = {key: stub for key, stub in stubs.items() if key not in sys.modules}
    sys.modules.update(added)
    try:
        return getattr(import_module(f"transformers.models.{module}"), name)
    finally:
        for key in added:
            del sys.modules[key]
