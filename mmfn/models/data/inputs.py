"""What a Hugging Face processor returns of media, as `Media`. Legend: U inputs, F values of one, N media."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mmfn.batch import Media
from mmfn.errors import UserError


def integers(key: str, tensor: Tensor) -> Tensor:
    """int64 on the CPU. Raises ValueError for numbers that are none."""
    if tensor.is_floating_point() and tensor.numel():  # an empty list is an array of floats
        raise UserError(f"{key} is of {tensor.dtype} but integers are needed; pass the processor's own result")
    return tensor.to("cpu", torch.int64)


def floats(key: str, tensor: Tensor) -> Tensor:
    """The tensor. Raises ValueError where it holds no real numbers, such as the bytes of an image."""
    if not tensor.is_floating_point():
        raise UserError(f"{key} is of {tensor.dtype} but floats are needed; pass the processor's own result")
    return tensor


def pair(inputs: Mapping[str, Tensor], first: str, second: str) -> tuple[Tensor, Tensor] | None:
    """Two entries that come together; None without both. Raises ValueError for one alone."""
    if first not in inputs and second not in inputs:
        return None
    for absent, present in ((first, second), (second, first)):
        if absent not in inputs:
            raise UserError(f"{absent} is missing although {present} is given; pass both")
    return inputs[first], inputs[second]


def grids_from_hf(
    inputs: Mapping[str, Tensor], values_key: str, grids_key: str, *, merge_size: int, num_values: int
) -> list[Media]:
    """Images or videos that a processor has cut into patches, end to end.

    `inputs[values_key]`: float[U, num_values]. `inputs[grids_key]`: int[N, 3], of each medium the time, height and
    width in patches. Raises ValueError for one without the other, and for shapes that disagree.
    """
    both = pair(inputs, values_key, grids_key)
    if both is None:
        return []
    values_UF, grids_N3 = floats(values_key, both[0]), integers(grids_key, both[1])
    if grids_N3.ndim != 2 or grids_N3.shape[1] != 3 or bool((grids_N3 < 1).any()):
        raise UserError(f"{grids_key} of shape {list(grids_N3.shape)} must be [media, 3] with entries of at least 1")
    if bool((grids_N3[:, 1:] % merge_size).any()):
        raise UserError(f"{grids_key} holds heights or widths that are no multiple of {merge_size}; resize the media")
    sizes = grids_N3.prod(1).tolist()
    if list(values_UF.shape) != [sum(sizes), num_values]:
        raise UserError(
            f"{values_key} has shape {list(values_UF.shape)} but its grids and the model need "
            f"[{sum(sizes)}, {num_values}]; use the processor of this model"
        )
    parts = zip(values_UF.split_with_sizes(sizes), grids_N3.tolist(), strict=True)
    return [Media(inputs_UF=part_UF, grid=(t, h, w)) for part_UF, (t, h, w) in parts]
