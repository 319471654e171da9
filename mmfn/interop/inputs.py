"""`batch_from_hf`: what a Hugging Face processor returns, packed. Legend: B rows, S columns, T tokens of a row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfn import tree
from mmfn.batch import AUDIO, IGNORE, IMAGE, VIDEO, Batch, Media, Sample, to
from mmfn.errors import UserError
from mmfn.interop.accounting import nearest
from mmfn.model import Model
from mmfn.models.data import MediaByKind
from mmfn.models.data.inputs import integers

_TEXT_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")
_KINDS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}


def batch_from_hf(inputs: Mapping[str, Any], model: Model) -> Batch:
    """The packed batch of what a Hugging Face processor returns; each row becomes one segment, padding is removed.

    `input_ids`, and optionally `attention_mask`, `mm_token_type_ids`, `labels`: int[B, S], padded left or right. Media
    under the keys of the model's family (such as `pixel_values` and `image_grid_thw`), those of each kind in reading
    order over all rows. Kinds of tokens are the family's; `mm_token_type_ids` may only confirm them. Without `labels`
    no token is supervised. The inputs may be on any device; the batch is on the model's.

    Raises ValueError for unknown keys, shapes that disagree, holes in the mask, supervised padding, and placeholders
    that do not match the media.
    """
    samples = samples_from_hf(inputs, model)
    return to(model.family.pack(samples, model.cfg), tree.leaves(model.params)[0].device)


def samples_from_hf(inputs: Mapping[str, Any], model: Model) -> list[Sample]:
    """The rows of `batch_from_hf`, each with its media, on the CPU. Raises ValueError as that does."""
    data, cfg = model.family.data, model.cfg
    for key in inputs:
        if key not in (*_TEXT_KEYS, *data.input_keys):
            near = nearest(key, (*_TEXT_KEYS, *data.input_keys))
            raise UserError(f"input {key!r} is not used by {model.family.name}{near}; remove it")
    present = {key: value for key, value in inputs.items() if value is not None}
    rows = _rows(present, model)
    media = data.media_from_hf({key: _tensor(key, present[key]) for key in data.input_keys if key in present}, cfg)
    return _attach_media(rows, media, lambda kind, medium: data.num_tokens(kind, medium, cfg))


def _rows(inputs: Mapping[str, Any], model: Model) -> list[Sample]:
    """One sample per row, padding removed, without media."""
    if "input_ids" not in inputs:
        raise UserError(
            f"input_ids is missing from inputs with keys {sorted(inputs)}; pass all of a processor's result"
        )
    text = {key: integers(key, _tensor(key, inputs[key])) for key in _TEXT_KEYS if key in inputs}
    ids_BS = text["input_ids"]
    for key, value in text.items():
        if value.ndim != 2 or value.shape != ids_BS.shape:
            raise UserError(
                f"{key} has shape {list(value.shape)} but [rows, columns] equal to input_ids {list(ids_BS.shape)} is "
                "needed; pass return_tensors='pt' and padding=True to the processor"
            )
    if ids_BS.numel() and not 0 <= int(ids_BS.min()) <= int(ids_BS.max()) < model.cfg.vocab_size:
        raise UserError(
            f"input_ids range over {int(ids_BS.min())}..{int(ids_BS.max())} but the vocabulary has "
            f"{model.cfg.vocab_size} entries; use the tokenizer of this model"
        )
    mask_BS = text.get("attention_mask", torch.ones_like(ids_BS))
    labels_BS = text.get("labels", torch.full_like(ids_BS, IGNORE))
    samples = []
    for row, mask_S in enumerate(mask_BS):
        is_token_S = _is_token(mask_S, row)
        if bool((labels_BS[row][~is_token_S] != IGNORE).any()):
            raise UserError(f"labels of row {row} supervise padding tokens; set them to {IGNORE}")
        tokens_T, labels_T = ids_BS[row][is_token_S], labels_BS[row][is_token_S]
        kinds_T = model.family.kinds(tokens_T, model.cfg)
        if "mm_token_type_ids" in text:
            _check_kinds(text["mm_token_type_ids"][row][is_token_S], tokens_T, kinds_T, row)
        samples.append(Sample(tokens_T=tokens_T, labels_T=labels_T, kinds_T=kinds_T, id=f"row {row}"))
    return samples


def _tensor(key: str, value: Any) -> Tensor:
    """A tensor on the CPU from a tensor, an array or nested lists."""
    if isinstance(value, Tensor):
        return value.cpu()
    try:
        return torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{key} of type {type(value).__name__} is no rectangular array of numbers; pass return_tensors='pt' and "
            "padding=True to the processor"
        ) from error


def _is_token(mask_S: Tensor, row: int) -> Tensor:
    """bool[S]: true where a token is no padding, one run of ones in the mask."""
    if not bool(((mask_S == 0) | (mask_S == 1)).all()):
        raise UserError(f"attention_mask of row {row} holds values other than 0 and 1; pass the processor's own mask")
    runs = int((mask_S.diff(prepend=mask_S.new_zeros(1)) == 1).sum())
    if runs != 1:
        state = "is empty" if runs == 0 else "has holes"
        raise UserError(f"attention_mask of row {row} {state}; only padding on the left or right is supported")
    return mask_S.bool()


def _check_kinds(claim_T: Tensor, tokens_T: Tensor, kinds_T: Tensor, row: int) -> None:
    odd = (claim_T != kinds_T).nonzero().flatten().tolist()
    if odd:
        token, kind, claim = (int(x_T[odd[0]]) for x_T in (tokens_T, kinds_T, claim_T))
        raise UserError(
            f"mm_token_type_ids of row {row} contradict input_ids: a token of id {token} is of kind {kind} but has "
            f"{claim}; leave the key out"
        )


def _attach_media(rows: Sequence[Sample], media: MediaByKind, num_tokens: Callable[[str, Media], int]) -> list[Sample]:
    """Hand media to the rows in reading order, by their numbers of placeholder tokens."""
    left = {kind: list(media.get(kind, ())) for kind in _KINDS}
    samples = []
    for row in rows:
        share = {kind: _take(row, kind, left[kind], num_tokens) for kind in _KINDS}
        samples.append(replace(row, images=share["image"], videos=share["video"], audios=share["audio"]))
    for kind, items in left.items():
        if items:
            total = sum(int((row.kinds_T == _KINDS[kind]).sum()) for row in rows)
            raise UserError(
                f"{len(items)} {kind}s are left over after all {total} {kind} placeholder tokens were filled; make the "
                "text and the media agree"
            )
    return samples


def _take(row: Sample, kind: str, media: list[Media], num_tokens: Callable[[str, Media], int]) -> tuple[Media, ...]:
    """The next media that fill the row's placeholders; removes them from `media`."""
    places, features, items = int((row.kinds_T == _KINDS[kind]).sum()), 0, []
    while features < places and media:
        items.append(media.pop(0))
        features += num_tokens(kind, items[-1])
    if features != places:
        raise UserError(
            f"{row.id} has {places} {kind} placeholder tokens but the next {len(items)} {kind}s give {features} "
            "features; make the text and the media agree"
        )
    return tuple(items)
