"""Generation: one prefill over the packed prompts, then one token per row and step through a cache.

A row ends on its own and leaves the batch with the others that have ended when these are half of it, so that all such
copies together cost less than one of the cache. The cache grows in place, by doubling, up to the longest row there can
be. Legend: T tokens, B rows, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfn.batch import IGNORE, Batch, Segments
from mmfn.errors import UserError
from mmfn.model import Model
from mmfn.models.layers import cache
from mmfn.ops import Ops
from mmfn.train.forward import Forward
from mmfn.train.sampling import GREEDY, Sampling, choose, row_keys
from mmfn.tree import Tree

ROOM = 64  # columns for new tokens that a cache begins with
MEETING = 16  # steps from one meeting of ranks to the next, at most

OnStep = Callable[[Sequence[int], Sequence[int]], Collection[int]]
"""(rows, by number, and the next token of each) -> the rows that end with it, beside those with an end token."""


def end_nothing(rows: Sequence[int], tokens: Sequence[int]) -> Collection[int]:
    """An `OnStep` of rows that end by themselves."""
    return ()


def generate(
    model: Model | Forward,
    batch: Batch,
    max_new_tokens: int = 32,
    *,
    eos_token_ids: Collection[int] = (),
    ops: Ops | None = None,
    sampling: Sampling = GREEDY,
    rows: Sequence[int] | None = None,
    on_step: OnStep = end_nothing,
    is_idle: bool = False,
    check_finite: bool = True,
) -> list[list[int]]:
    """The continuation of every row (segment) of a packed batch, token ids without the prompt.

    A row's list ends with the first of `eos_token_ids` it produces (which is included, as in transformers), where
    `on_step` ends it, or after `max_new_tokens`. Segments of length zero are padding and have no list. Rope positions
    continue one behind the largest of the prompt, in all three coordinates. `sampling`: by default the most likely
    tokens; what is drawn for a row is a function of its number in `rows` (default: its place in the batch) alone.

    `model`: a whole one, computed by `ops` (default `ops.portable()`), or a `Forward`. Of a `Forward` on several ranks
    all call this together, with the same settings and each with its own rows; whoever is done goes on idly until all
    are, which they tell each other now and then. `is_idle`: this rank has no rows, and its batch is computed in vain.

    Raises ValueError when `max_new_tokens` is below 1 or the batch has no row and, unless `check_finite` is false, when
    the logits of a first token are not finite.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens} but must be at least 1")
    forward = model if isinstance(model, Forward) else Forward.of(model, ops)
    num_rows = int((batch.segments.host_N.diff() > 0).sum())
    if num_rows == 0:
        raise UserError("the batch has no row to continue; pack at least one sample")
    numbers = list(range(num_rows)) if rows is None else list(rows)
    settings = _Settings(max_new_tokens=max_new_tokens, eos=frozenset(eos_token_ids), sampling=sampling)
    with torch.no_grad():
        session, logits_BV = _prefill(forward, batch, numbers, settings)
        if check_finite and not bool(logits_BV.isfinite().all()):
            raise UserError("the logits are not finite; the model's weights (or its adapter's) are damaged or diverged")
        if is_idle:
            session.live.clear()
        while session.take(logits_BV, on_step):
            logits_BV = session.step()
    return session.answers


@dataclass(frozen=True, kw_only=True)
class _Settings:
    max_new_tokens: int
    eos: frozenset[int]
    sampling: Sampling


@dataclass(kw_only=True, eq=False)
class _Session:
    """Rows on their way. `live`: place in the batch -> place among all rows, of those that have not ended.

    Of the rows of the batch: `tokens_B` chosen last, `filled_B` columns of the cache, `positions_B` of the next token,
    `keys_B` (on the host) for what is drawn, and the tokens `is_seen_BV` where these count. `longest`: the most of
    `filled_B`.
    """

    forward: Forward
    settings: _Settings
    numbers: list[int]
    answers: list[list[int]]
    live: dict[int, int]
    layers: Sequence[Tree]
    num_columns: int
    longest: int
    filled_B: Tensor
    positions_B: Tensor
    keys_B: Tensor
    is_seen_BV: Tensor | None
    tokens_B: Tensor
    num_new: int = 0

    def take(self, logits_BV: Tensor, on_step: OnStep) -> bool:
        """Choose the next token of every row. Returns whether any row of any rank goes on."""
        places_B = torch.full_like(self.keys_B, self.num_new)
        self.tokens_B = choose(logits_BV, self.settings.sampling, self.keys_B, places_B, self.is_seen_BV)
        self.num_new += 1
        if self.is_seen_BV is not None:
            self.is_seen_BV.scatter_(1, self.tokens_B[:, None], True)
        tokens: list[int] = self.tokens_B.tolist()
        for place, row in self.live.items():
            self.answers[row].append(tokens[place])
        new = [tokens[place] for place in self.live]
        ended = set(on_step([self.numbers[row] for row in self.live.values()], new)) if self.live else set()
        self.live = {
            place: row
            for place, row in self.live.items()
            if tokens[place] not in self.settings.eos and self.numbers[row] not in ended
        }
        return self.num_new < self.settings.max_new_tokens and self._goes_on()

    def _goes_on(self) -> bool:
        axis = self.forward.axis
        if axis.size == 1:
            return bool(self.live)
        is_meeting = self.num_new % MEETING == 0 or (self.num_new < MEETING and self.num_new.bit_count() == 1)
        return not is_meeting or bool(axis.all_reduce(torch.tensor([len(self.live)]), "rows that go on"))

    def step(self) -> Tensor:
        """The logits behind the tokens chosen last."""
        num_rows = len(self.tokens_B)
        if len(self.live) <= num_rows // 2 and num_rows > 1:
            self._leave(list(self.live) or [0])
        if self.longest == self.num_columns:
            most = self.longest + self.settings.max_new_tokens - self.num_new
            self.num_columns = min(2 * self.num_columns, most)
            self.layers = cache.with_columns(self.layers, self.num_columns)
        state = cache.Cache(layers=self.layers, slots=_decode_slots(self.filled_B))
        output = self.forward(_decode_batch(self.tokens_B, self.positions_B), state)
        self.layers, self.longest = output.cache.layers, self.longest + 1
        self.filled_B, self.positions_B = self.filled_B + 1, self.positions_B + 1
        return self.forward.logits(output.hidden_TD)

    def _leave(self, stay: Sequence[int]) -> None:
        """Compute these places of the batch alone from here on; one that has ended stays where none goes on."""
        index_B = torch.tensor(stay, device=self.tokens_B.device)
        self.keys_B = self.keys_B[torch.tensor(stay)]
        for name in ("tokens_B", "filled_B", "positions_B", "is_seen_BV"):
            values = getattr(self, name)
            setattr(self, name, None if values is None else values[index_B])
        self.layers, self.longest = cache.with_rows(self.layers, stay), int(self.filled_B.max())
        self.live = {i: self.live[place] for i, place in enumerate(stay) if place in self.live}


def _prefill(forward: Forward, batch: Batch, numbers: Sequence[int], settings: _Settings) -> tuple[_Session, Tensor]:
    """The session behind the prompts, and the logits of the first new tokens."""
    offsets_N = batch.segments.offsets_N.long()
    lengths_B = (all_lengths_N := offsets_N.diff())[all_lengths_N > 0]
    last_B = (offsets_N[1:] - 1)[all_lengths_N > 0]
    num_rows, longest = len(numbers), batch.segments.longest
    num_columns = longest + min(settings.max_new_tokens, ROOM)  # the last new token is never cached: one is spare
    layers = forward.family.empty_cache(forward.cfg, num_rows, num_columns, forward.dtype, forward.device)
    slots = _prompt_slots(lengths_B, batch.tokens_T.numel(), num_columns - 1)
    output = forward(batch, cache.Cache(layers=layers, slots=slots))
    has_memory = settings.sampling.has_memory
    is_seen_BV = _seen(batch, slots.rows_T, num_rows, forward.cfg.vocab_size) if has_memory else None
    session = _Session(
        forward=forward,
        settings=settings,
        numbers=list(numbers),
        answers=[[] for _ in numbers],
        live={place: place for place in range(num_rows)},
        layers=output.cache.layers,
        num_columns=num_columns,
        longest=longest,
        filled_B=lengths_B,
        positions_B=_next_positions(batch.positions_3T, offsets_N)[all_lengths_N > 0],
        keys_B=row_keys(settings.sampling, numbers),
        is_seen_BV=is_seen_BV,
        tokens_B=lengths_B,
    )
    return session, forward.logits(output.hidden_TD[last_B])


def _seen(batch: Batch, rows_T: Tensor, num_rows: int, num_vocabulary: int) -> Tensor:
    """bool[B, V]: the tokens that stand in every row."""
    num_tokens = int(batch.segments.host_N[-1])
    is_seen_BV = torch.zeros(num_rows, num_vocabulary, dtype=torch.bool, device=rows_T.device)
    is_seen_BV[rows_T[:num_tokens], batch.tokens_T[:num_tokens]] = True
    return is_seen_BV


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
