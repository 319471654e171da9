"""Greedy generation: one prefill over the packed prompts, then one token per row and step through a key-value cache.

Legend: T packed tokens, B rows, S cache columns, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmfn import ops as op_tables
from mmfn.batch import IGNORE, Batch, Segments
from mmfn.errors import UserError
from mmfn.model import Model
from mmfn.models.layers import cache
from mmfn.ops import Ops


@torch.no_grad()
def generate(
    model: Model,
    batch: Batch,
    max_new_tokens: int = 32,
    *,
    eos_token_ids: Sequence[int] = (),
    ops: Ops | None = None,
    check_finite: bool = True,
) -> list[list[int]]:
    """The most likely continuation of every row (segment) of a packed batch, token ids without the prompt.

    A row's list ends with the first of `eos_token_ids` it produces (which is included, as in transformers) or after
    `max_new_tokens`. All rows run until the last one is done. Segments of length zero are padding and have no list.
    Rope positions continue one behind the largest of the prompt, in all three coordinates. `ops` defaults to
    `ops.portable()`. Raises ValueError when `max_new_tokens` is below 1 or the batch has no row and, unless
    `check_finite` is false, when the logits of a first token are not finite.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens} but must be at least 1")
    offsets_N = batch.segments.offsets_N.long()
    lengths_B = (all_lengths_N := offsets_N.diff())[all_lengths_N > 0]
    last_B = (offsets_N[1:] - 1)[all_lengths_N > 0]
    if lengths_B.numel() == 0:
        raise UserError("the batch has no row to continue; pack at least one sample")
    table = ops or op_tables.portable()
    start_B = _next_positions(batch.positions_3T, offsets_N)[all_lengths_N > 0]
    head_VD = model.family.head(model.params, model.cfg, table)
    num_columns = int(lengths_B.max()) + max_new_tokens  # the last new token is never cached: one column is spare
    layers = model.family.empty_cache(model.cfg, lengths_B.numel(), num_columns, head_VD.dtype, head_VD.device)
    state = cache.Cache(layers=layers, slots=_prompt_slots(lengths_B, batch.tokens_T.numel(), num_columns - 1))
    output = model.family.apply(model.params, batch, model.cfg, table, cache=state)
    eos = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=offsets_N.device)
    logits_BV = linear(output.hidden_TD[last_B], head_VD)
    if check_finite and not bool(logits_BV.isfinite().all()):
        raise UserError("the logits are not finite; the model's weights (or its adapter's) are damaged or diverged")
    tokens_B = logits_BV.argmax(-1)
    steps, is_done_B = [tokens_B], torch.isin(tokens_B, eos)
    while len(steps) < max_new_tokens and not (len(eos_token_ids) and bool(is_done_B.all())):
        made = len(steps) - 1  # tokens behind the prompt that are already in the cache
        slots = _decode_slots(lengths_B + made)
        step = _decode_batch(tokens_B, start_B + made)
        state = cache.Cache(layers=output.cache.layers, slots=slots)
        output = model.family.apply(model.params, step, model.cfg, table, cache=state)
        tokens_B = linear(output.hidden_TD, head_VD).argmax(-1)
        steps.append(tokens_B)
        is_done_B = is_done_B | torch.isin(tokens_B, eos)
    return [_until_eos(row, eos_token_ids) for row in torch.stack(steps, dim=1).tolist()]


def _next_positions(positions_3T: Tensor, offsets_N: Tensor) -> Tensor:
    """float32[N]: one behind the largest position of every segment."""
    num_tokens = int(offsets_N[-1])
    largest_T = positions_3T.amax(0)[:num_tokens]
    segment_T = torch.repeat_interleave(offsets_N.diff())
    zero_N = largest_T.new_zeros(offsets_N.numel() - 1)
    return zero_N.scatter_reduce(0, segment_T, largest_T, "amax") + 1


def _prompt_slots(lengths_B: Tensor, num_tokens: int, spare: int) -> cache.Slots:
    """Row and place within it of every packed token; padding goes to the spare column."""
    rows_T = torch.repeat_interleave(lengths_B)
    columns_T = torch.arange(rows_T.numel(), device=rows_T.device) - (lengths_B.cumsum(0) - lengths_B)[rows_T]
    tail = num_tokens - rows_T.numel()
    return cache.Slots(
        rows_T=torch.cat([rows_T, rows_T.new_zeros(tail)]),
        columns_T=torch.cat([columns_T, columns_T.new_full((tail,), spare)]),
        lengths_B=lengths_B,
        is_prefill=True,
    )


def _decode_slots(filled_B: Tensor) -> cache.Slots:
    """One token per row, behind the `filled_B` tokens that are there."""
    rows_B = torch.arange(filled_B.numel(), device=filled_B.device)
    return cache.Slots(rows_T=rows_B, columns_T=filled_B, lengths_B=filled_B + 1, is_prefill=False)


def _decode_batch(tokens_B: Tensor, positions_B: Tensor) -> Batch:
    """A packed batch of one token per row, without media."""
    B, device = tokens_B.numel(), tokens_B.device
    ends_B = torch.arange(B + 1, dtype=torch.int32)
    return Batch(
        tokens_T=tokens_B,
        positions_3T=positions_B.expand(3, -1),
        segments=Segments(offsets_N=ends_B.to(device), host_N=ends_B),
        labels_T=torch.full_like(tokens_B, IGNORE),
        weights_T=torch.zeros(B, device=device),
        segment_T=torch.arange(B, device=device),
        token_ids_T=torch.full_like(tokens_B, -1),
    )


def _until_eos(row: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in eos_token_ids]
    return row[: ends[0] + 1] if ends else row
