"""`batch_from_hf`: what a Hugging Face processor returns, packed. Legend: B rows, S columns, T tokens of a row."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfn import tree
from mmfn.batch import IGNORE, IMAGE, TEXT, VIDEO, Batch, Media, Sample, to
from mmfn.interop.accounting import nearest
from mmfn.model import Model

# Keys a processor of these families may return; `(pixels, grids)` of each kind of media.
_MEDIA = {IMAGE: ("pixel_values", "image_grid_thw"), VIDEO: ("pixel_values_videos", "video_grid_thw")}
_TEXT_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")
_KEYS = (*_TEXT_KEYS, *(key for pair in _MEDIA.values() for key in pair))
_NAMES = {IMAGE: "image", VIDEO: "video"}


def batch_from_hf(inputs: Mapping[str, Any], model: Model) -> Batch:
    """The packed batch of what a Hugging Face processor returns; each row becomes one segment, padding is removed.

    `input_ids`, and optionally `attention_mask`, `mm_token_type_ids`, `labels`: int[B, S], padded left or right.
    `pixel_values` float[patches, F] with `image_grid_thw` int[N, 3] (temporal, height, width in patches); likewise
    `pixel_values_videos` with `video_grid_thw`; images and videos in reading order over all rows. Kinds of tokens are
    derived from the placeholder ids when `mm_token_type_ids` is absent. Without `labels` no token is supervised. The
    inputs may be on any device; the batch is on the model's.

    Raises ValueError for unknown keys, shapes that disagree, holes in the mask, supervised padding, and placeholders
    that do not match the media.
    """
    for key in inputs:
        if key not in _KEYS:
            raise ValueError(f"input {key!r} is not used by {model.family.name}{nearest(key, _KEYS)}; remove it")
    rows = _rows({k: v for k, v in inputs.items() if v is not None}, model)
    cfg = model.cfg
    samples = _attach_media(rows, inputs, cfg.vision.merge_size, cfg.vision.patch_values)
    return to(model.family.pack(samples, cfg), tree.leaves(model.params)[0].device)


def _rows(inputs: Mapping[str, Any], model: Model) -> list[Sample]:
    """One sample per row, padding removed, without media."""
    if "input_ids" not in inputs:
        raise ValueError(
            f"input_ids is missing from inputs with keys {sorted(inputs)}; pass all of a processor's result"
        )
    text = {key: _integers(key, inputs[key]) for key in _TEXT_KEYS if key in inputs}
    ids_BS = text["input_ids"]
    for key, value in text.items():
        if value.ndim != 2 or value.shape != ids_BS.shape:
            raise ValueError(
                f"{key} has shape {list(value.shape)} but [rows, columns] equal to input_ids {list(ids_BS.shape)} is "
                "needed; pass return_tensors='pt' and padding=True to the processor"
            )
    if ids_BS.numel() and not 0 <= int(ids_BS.min()) <= int(ids_BS.max()) < model.cfg.vocab_size:
        raise ValueError(
            f"input_ids range over {int(ids_BS.min())}..{int(ids_BS.max())} but the vocabulary has "
            f"{model.cfg.vocab_size} entries; use the tokenizer of this model"
        )
    mask_BS = text.get("attention_mask", torch.ones_like(ids_BS))
    labels_BS = text.get("labels", torch.full_like(ids_BS, IGNORE))
    samples = []
    for row, mask_S in enumerate(mask_BS):
        kept_S = _kept(mask_S, row)
        if bool((labels_BS[row][~kept_S] != IGNORE).any()):
            raise ValueError(f"labels of row {row} supervise padding tokens; set them to {IGNORE}")
        tokens_T, labels_T = ids_BS[row][kept_S], labels_BS[row][kept_S]
        kinds_T = _kinds(tokens_T, model)
        if "mm_token_type_ids" in text and not torch.equal(text["mm_token_type_ids"][row][kept_S], kinds_T):
            raise ValueError(
                f"mm_token_type_ids of row {row} contradict input_ids: {IMAGE} is for id {model.cfg.image_token_id}, "
                f"{VIDEO} for id {model.cfg.video_token_id}, {TEXT} for all others; leave the key out"
            )
        samples.append(Sample(tokens_T=tokens_T, labels_T=labels_T, kinds_T=kinds_T, id=f"row {row}"))
    return samples


def _tensor(key: str, value: Any) -> Tensor:
    """A tensor on the CPU from a tensor, an array or nested lists."""
    if isinstance(value, Tensor):
        return value.cpu()
    try:
        return torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{key} of type {type(value).__name__} is no rectangular array of numbers; pass return_tensors='pt' and "
            "padding=True to the processor"
        ) from error


def _integers(key: str, value: Any) -> Tensor:
    """int64 on the CPU."""
    tensor = _tensor(key, value)
    if tensor.is_floating_point() and tensor.numel():  # an empty list is an array of floats
        raise ValueError(f"{key} is of {tensor.dtype} but integers are needed; pass the processor's own result")
    return tensor.to(torch.int64)


def _kept(mask_S: Tensor, row: int) -> Tensor:
    """True where a token is kept: one run of ones."""
    if not bool(((mask_S == 0) | (mask_S == 1)).all()):
        raise ValueError(f"attention_mask of row {row} holds values other than 0 and 1; pass the processor's own mask")
    runs = int((mask_S.diff(prepend=mask_S.new_zeros(1)) == 1).sum())
    if runs != 1:
        state = "is empty" if runs == 0 else "has holes"
        raise ValueError(f"attention_mask of row {row} {state}; only padding on the left or right is supported")
    return mask_S.bool()


def _kinds(tokens_T: Tensor, model: Model) -> Tensor:
    """int64[T]: kind of every token, from the placeholder ids."""
    kinds_T = torch.full_like(tokens_T, TEXT)
    kinds_T[tokens_T == model.cfg.image_token_id] = IMAGE
    kinds_T[tokens_T == model.cfg.video_token_id] = VIDEO
    return kinds_T


def _attach_media(rows: list[Sample], inputs: Mapping[str, Any], merge_size: int, patch_values: int) -> list[Sample]:
    """Hand images and videos to the rows in reading order, by their numbers of placeholder tokens."""
    media = {kind: _media(inputs, kind, merge_size, patch_values) for kind in _MEDIA}
    samples = []
    for row in rows:
        own = {kind: _take(row, kind, media[kind], merge_size) for kind in _MEDIA}
        samples.append(replace(row, images=own[IMAGE], videos=own[VIDEO]))
    for kind, left in media.items():
        if left:
            total = sum(int((row.kinds_T == kind).sum()) for row in rows)
            raise ValueError(
                f"{len(left)} {_NAMES[kind]}s are left over after all {total} {_NAMES[kind]} placeholder tokens were "
                "filled; make the text and the media agree"
            )
    return samples


def _media(inputs: Mapping[str, Any], kind: int, merge_size: int, patch_values: int) -> list[Media]:
    pixels_key, grids_key = _MEDIA[kind]
    pixels, grids = inputs.get(pixels_key), inputs.get(grids_key)
    if pixels is None and grids is None:
        return []
    if pixels is None or grids is None:
        absent, present = (pixels_key, grids_key) if pixels is None else (grids_key, pixels_key)
        raise ValueError(f"{absent} is missing although {present} is given; pass both")
    patches_PF, grids_N3 = _tensor(pixels_key, pixels), _integers(grids_key, grids)
    if grids_N3.ndim != 2 or grids_N3.shape[1] != 3 or bool((grids_N3 < 1).any()):
        raise ValueError(f"{grids_key} of shape {list(grids_N3.shape)} must be [media, 3] with entries of at least 1")
    if bool((grids_N3[:, 1:] % merge_size).any()):
        raise ValueError(f"{grids_key} holds heights or widths that are no multiple of {merge_size}; resize the media")
    sizes = grids_N3.prod(1).tolist()
    if list(patches_PF.shape) != [sum(sizes), patch_values]:
        raise ValueError(
            f"{pixels_key} has shape {list(patches_PF.shape)} but its grids and the model need "
            f"[{sum(sizes)}, {patch_values}]; use the processor of this model"
        )
    ends = accumulate(sizes)
    parts = [patches_PF[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return [Media(inputs_UF=p, grid=(t, h, w)) for p, (t, h, w) in zip(parts, grids_N3.tolist(), strict=True)]


def _take(row: Sample, kind: int, media: list[Media], merge_size: int) -> tuple[Media, ...]:
    """The next media that fill the row's placeholders; removes them from `media`."""
    places, filled, taken = int((row.kinds_T == kind).sum()), 0, []
    while filled < places and media:
        taken.append(media.pop(0))
        filled += taken[-1].inputs_UF.shape[0] // merge_size**2
    if filled != places:
        raise ValueError(
            f"{row.id} has {places} {_NAMES[kind]} placeholder tokens but the next {len(taken)} {_NAMES[kind]}s give "
            f"{filled} features; make the text and the media agree"
        )
    return tuple(taken)
