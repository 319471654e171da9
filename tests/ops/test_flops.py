"""FLOPs of operators: where torch has a formula too, the same figure; attention by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import mmfn.parallel.transforms.expert_parallel  # noqa: F401  (brings mmfn::host_copy)
from mmfn.batch import Segments
from mmfn.ops import flops
from mmfn.ops.attention import attention
from mmfn.ops.dispatch import TAKE_ROWS

ATEN = torch.ops.aten
A, B, C = torch.zeros(4, 3), torch.zeros(3, 5), torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        (ATEN.mm, (A, B)),
        (ATEN.addmm, (C, A, B)),
        (ATEN.bmm, (A.expand(2, 4, 3), B.expand(2, 3, 5))),
        (ATEN.baddbmm, (C.expand(2, 4, 5), A.expand(2, 4, 3), B.expand(2, 3, 5))),
    ],
    ids=str,
)
def test_products_count_as_in_torch(operator, args):
    out = operator(*args)
    found, want = flops.OWN[operator](*args, out_val=out), flop_registry[operator](*args, out_val=out)
    assert found == want == 2 * 3 * out.numel()


def test_what_torch_lacks():
    assert flops.OWN[ATEN.mv](A, torch.zeros(3), out_val=None) == 2 * 12
    assert flops.OWN[ATEN.addmm_](C, A, B, beta=1, out_val=None) == 2 * 60


@pytest.mark.parametrize(("is_causal", "pairs"), [(True, 3 + 10), (False, 4 + 16)])
def test_attention_counts_pairs_of_every_segment(is_causal, pairs):
    """Two segments, of 2 and 4 tokens: scores and values, and five products in the backward."""
    q = torch.zeros(7, 4, 8, requires_grad=True)
    k, v = (torch.zeros(7, 2, 8, requires_grad=True) for _ in range(2))
    segments = Segments.of(torch.tensor([0, 2, 6, 6], dtype=torch.int32))
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, segments, is_causal=is_causal).sum().backward()
    found = counter.get_flop_counts()["Global"]
    assert found == {torch.ops.mmfn.attention: 4 * 32 * pairs, torch.ops.mmfn.attention_grad: 10 * 32 * pairs}


def test_an_unknown_operator_is_refused_and_torchs_own_counts_nothing():
    assert flops.formula_of(ATEN.relu.default, {}) is None
    assert flops.formula_of(torch.ops.mmfn.host_copy.default, {}) is None, "what programs copy multiplies nothing"
    with pytest.raises(ValueError, match="no op of the table declares the operator mmfn::take_rows"):
        flops.formula_of(TAKE_ROWS.traced._opoverload, {})  # of this package, but of a table without it
    unknown = torch.library.custom_op(
        "elsewhere::square", lambda x: x * x, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    with pytest.raises(ValueError, match="no op of the table declares the operator elsewhere::square"):
        flops.formula_of(unknown._opoverload, {})
    assert flops.formula_of(unknown._opoverload, {torch.ops.elsewhere.square: None}) is None


def test_pairs_of_long_segments_do_not_overflow():
    """More than 46,340 tokens have more pairs than int32 holds, which offsets are."""
    T = 100_000
    x_THC = torch.empty(T, 1, 8, device="meta")
    offsets_N = torch.tensor([0, T], dtype=torch.int32)
    assert flops.packed_attention(x_THC, x_THC, x_THC, offsets_N, True) == 4 * 8 * (T * (T + 1) // 2)
    assert flops.packed_attention(x_THC, x_THC, x_THC, offsets_N, False, offsets_N) == 4 * 8 * T * T
