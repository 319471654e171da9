"""Which tokens a context-parallel rank holds."""

from itertools import accumulate

import pytest
import torch

from mmfn.parallel.context.token_order import (
    chunk_order,
    ring_order,
    segment_multiple,
    split_tokens,
    token_multiple,
    token_order,
)
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.mesh.virtual import virtual
from tests.parallel.conformance import Cell, batch_of


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def test_chunks_of_the_row() -> None:
    orders = [chunk_order(12, Axis(name="cp", size=3, index=r)).tolist() for r in range(3)]
    assert orders == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


def test_ring_takes_a_chunk_of_every_segment_then_its_mirror() -> None:
    """Segments of 4 and 8 tokens, then 4 of padding."""
    orders = [ring_order(offsets(4, 0, 8), 16, Axis(name="ring", size=2, index=r)).tolist() for r in range(2)]
    assert orders == [[0, 4, 5, 12, 3, 10, 11, 15], [1, 6, 7, 13, 2, 8, 9, 14]]


def test_usp_cuts_the_ring_ranks_row() -> None:
    orders = virtual(Layout(cp=4, ulysses=2), lambda mesh: token_order(offsets(4, 0, 8), 16, "usp", mesh).tolist())
    assert orders == [[0, 4, 5, 12], [3, 10, 11, 15], [1, 6, 7, 13], [2, 8, 9, 14]]


@pytest.mark.parametrize("kind", ["gather", "ring"])
def test_a_batch_keeps_every_token_with_all_that_belongs_to_it(kind: str) -> None:
    layout = Layout(cp=2)
    pack = {"segment_multiple": segment_multiple(kind, layout)}
    batch = batch_of(Cell(layout=layout, name="", transforms=(), pack=pack))
    before = batch.tokens_T.clone()
    parts = virtual(layout, lambda mesh: split_tokens(batch, kind, mesh))
    orders = virtual(layout, lambda mesh: token_order(batch.segments.offsets_N, batch.tokens_T.numel(), kind, mesh))
    assert torch.equal(batch.tokens_T, before)
    for part, order in zip(parts, orders, strict=True):
        for name in ("tokens_T", "labels_T", "weights_T", "segment_T", "token_ids_T"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[order])
        assert torch.equal(part.towers["vision"].index_T, batch.towers["vision"].index_T[order])
        assert torch.equal(part.positions_3T, batch.positions_3T[:, order])
        assert torch.equal(part.segments.offsets_N, batch.segments.offsets_N)
        assert part.segments.spread == "cp"
        assert part.num_segments == batch.num_segments


def test_multiples() -> None:
    usp = Layout(cp=12, ulysses=4)
    assert [token_multiple(kind, Layout(cp=4)) for kind in ("ring", "gather")] == [8, 8]
    assert (token_multiple("ulysses", Layout(cp=4, ulysses=4)), token_multiple("usp", usp)) == (4, 12)
    assert [segment_multiple(kind, usp) for kind in ("ulysses", "gather", "ring", "usp")] == [1, 1, 6, 6]
    assert segment_multiple("ring", Layout()) == 1


@pytest.mark.parametrize(
    ("kind", "lengths", "num_tokens", "message"),
    [
        ("gather", (5,), 10, "has 10 tokens but .*'gather'.* needs a multiple of 4; round the token bucket up to 12"),
        ("ring", (4,), 6, "round the token bucket up to 8"),
        ("ring", (4, 6), 12, "segment has 6 tokens but a ring of 2 ranks .* pack with segment_multiple=4"),
    ],
)
def test_what_cannot_be_divided_is_refused(kind: str, lengths: tuple[int, ...], num_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        virtual(Layout(cp=2), lambda mesh: token_order(offsets(*lengths), num_tokens, kind, mesh))
