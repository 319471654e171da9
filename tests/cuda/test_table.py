"""The table of GPUs, its operators emulated: ops against the reference, whole steps against those of the CPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import ops as tables
from mmfn.batch import Segments
from mmfn.ops import Ops, table
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.program import Program, Transform
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.transforms.vocabulary_parallel import vocabulary_parallel
from tests import tiny
from tests.cuda import emulated as kernels
from tests.cuda.emulated import emulated
from tests.parallel.conformance import Cell, check_cell, spread

REFERENCE = tables.reference()
LENGTHS = ([5, 3, 8], [1, 0, 4, 0], [16], [2] * 6)
TAIL = 3  # rows behind the last segment
KEEP = remat("selective", save=("attention", "experts"))


def on_gpu(program: Program) -> Program:
    """As a transform, which comes first."""
    return replace(program, ops=table("cuda"))


def cell(family: str, layout: Layout, *transforms: Transform, **fields: Any) -> Cell:
    return Cell(layout=layout, transforms=(on_gpu, *transforms), family=family, name="cuda", **fields)


def segments_of(lengths: Sequence[int]) -> Segments:
    return Segments.of(torch.tensor([0, *lengths]).cumsum(0).int())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def gradients(fn: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = fn(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, drawn(*out.shape, seed=1))]


def check_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_attention(lengths: list[int], is_causal: bool) -> None:
    segments, T = segments_of(lengths), sum(lengths) + TAIL
    qkv = drawn(T, 4, 8), drawn(T, 2, 8, seed=1), drawn(T, 2, 8, seed=2)
    with emulated():
        found = gradients(lambda *x: table("cuda").attention(*x, segments, is_causal=is_causal), *qkv)
        assert kernels.calls == {"forward": 1, "backward": 1}
    check_close(found, gradients(lambda *x: REFERENCE.attention(*x, segments, is_causal=is_causal), *qkv))
    assert all(not x[sum(lengths) :].any() for x in found)


@pytest.mark.parametrize("key_lengths", [[3, 4, 2], [0, 5, 1], [6, 0, 0]], ids=str)
def test_blocks(key_lengths: list[int]) -> None:
    """Queries and keys of other lengths, with the log-sum-exp of all keys in the backward."""
    segments, keys = segments_of([5, 0, 4]), segments_of(key_lengths)
    q, k, v = drawn(9 + TAIL, 4, 8), drawn(sum(key_lengths) + 1, 2, 8), drawn(sum(key_lengths) + 1, 2, 8, seed=1)
    expected = REFERENCE.attention_block(q, k, v, segments, keys, is_causal=False)
    with emulated():
        check_close(table("cuda").attention_block(q, k, v, segments, keys, is_causal=False), expected)
        o, lse = expected
        saved = (drawn(*q.shape, seed=3), q, k, v, o, (lse + 0.7).clamp(min=-1e9), segments, keys)
        found = table("cuda").attention_block_grad(*saved, is_causal=False)
    check_close(found, REFERENCE.attention_block_grad(*saved, is_causal=False))


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 2], [5, 5, 0]], ids=str)
def test_experts(counts: list[int]) -> None:
    rows, counts_E = drawn(sum(counts) + TAIL, 8), torch.tensor(counts)
    gate_up, down = drawn(3, 12, 8), drawn(3, 8, 6)

    def run(ops: Ops) -> list[Tensor]:
        return gradients(lambda x, a, b: ops.experts(x, counts_E, {"gate_up": a, "down": b}), rows, gate_up, down)

    with emulated():
        found = run(table("cuda"))
        assert kernels.calls["grouped_mm"] == 6
    check_close(found, run(REFERENCE))


@pytest.mark.parametrize("shape", [(5, 8), (3, 2, 8), (0, 8), (8,)], ids=str)
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = drawn(*shape), drawn(8, seed=1)
    with emulated():
        found = gradients(lambda *xs: table("cuda").rms_norm(*xs, 1e-2), x, weight)
        assert kernels.calls["rms_norm"] == 1
        assert kernels.calls["rms_norm_grad"] == (1 if x.numel() else 0)
    check_close(found, gradients(lambda *xs: REFERENCE.rms_norm(*xs, 1e-2), x, weight))


def test_a_frozen_norm_has_no_gradient_of_weights() -> None:
    x, weight = drawn(5, 8), drawn(8, seed=1)
    with emulated():
        found = gradients(lambda x: table("cuda").rms_norm(x, weight, 1e-2), x)
        assert (kernels.calls["rms_norm_grad"], kernels.calls["rms_norm_grad of weights"]) == (1, 0)
    check_close(found, gradients(lambda x: REFERENCE.rms_norm(x, weight, 1e-2), x))


def test_rms_norm_rounds_as_it_says() -> None:
    """To the bit of the reference with a weight that is wider; with one that is not once, so nearer to the truth."""
    x, weight = drawn(200, 8).bfloat16(), 1 + drawn(8, seed=1)
    with emulated():
        for wide in (weight.float(), weight):
            assert torch.equal(table("cuda").rms_norm(x, wide, 1e-6), REFERENCE.rms_norm(x, wide, 1e-6))
        narrow = weight.bfloat16()
        found, twice = (ops.rms_norm(x, narrow, 1e-6).double() for ops in (table("cuda"), REFERENCE))
    exact = REFERENCE.rms_norm(x.double(), narrow.double(), 1e-6)
    unit = 2.0 ** (exact.abs().log2().floor() - 7)
    assert ((found - exact).abs() <= 0.501 * unit).all()
    assert ((found - twice).abs() <= 2 * unit).all()
    assert not torch.equal(found, twice)


def test_a_plan_of_compiled_blocks_leaves_norms_to_the_compiler() -> None:
    assert tables.planned_table("cuda").rms_norm is table("cuda").rms_norm
    compiled_one = tables.planned_table("cuda", is_compiled=True)
    assert compiled_one.rms_norm.operators == {}
    assert compiled_one.attention is table("cuda").attention


def test_chunks_of_logits_fill_a_gpu() -> None:
    """16,384 tokens of a vocabulary of 151,936 go through 8 chunks, on a CPU through 64."""
    rows = tables.cross_entropy.chunk_rows
    assert 16_384 // rows(151_936, table("cuda").logit_bytes) == 8
    assert 16_384 // rows(151_936, table("portable").logit_bytes) == 64
    assert rows(2, table("cuda").logit_bytes) == 4096


def test_what_the_kernels_lack_is_said() -> None:
    class OnGpu:
        """As far as the checks look."""

        def __init__(self, dtype: torch.dtype, *shape: int) -> None:
            self.device, self.dtype, self.shape = torch.device("cuda"), dtype, torch.Size(shape)

    check = tables.cuda.attention.check
    check(OnGpu(torch.bfloat16, 4, 2, 72))
    with pytest.raises(ValueError, match=r"made for bfloat16 and float16 but got torch.float32; set layout.compute_"):
        check(OnGpu(torch.float32, 4, 2, 64))
    for channels in (68, 264):
        with pytest.raises(ValueError, match=f"multiple of 8 channels up to 256 but these have {channels}"):
            check(OnGpu(torch.bfloat16, 4, 2, channels))
    check = tables.cuda.experts.check_kernel
    with pytest.raises(ValueError, match=r"experts of the cuda table are made for bfloat16 but got torch.float16"):
        check(OnGpu(torch.float16, 4, 64), OnGpu(torch.float16, 2, 8, 64))
    with pytest.raises(ValueError, match=r"widths of a multiple of 8 but these are \[12, 64\]"):
        check(OnGpu(torch.bfloat16, 4, 64), OnGpu(torch.bfloat16, 2, 12, 64))


MOE = [name for name in tiny.TINY if tiny.has_experts(name)]
LAYOUTS = {
    "one": (Layout(), ()),
    "remat": (Layout(), (KEEP,)),
    "compiled": (Layout(), (KEEP, compiled("layer", backend="aot_eager"))),
    "dp, sharded head": (Layout(dp=2), (data_parallel(), vocabulary_parallel())),
}
KINDS = {"ulysses": Layout(cp=2, ulysses=2), "gather": Layout(cp=2), "ring": Layout(cp=2)}


def is_recurrent(family: str) -> bool:
    model = tiny.model_of(family)
    return model.family.is_recurrent(model.cfg)


CELLS = {
    f"{family}, {name}": cell(family, layout, *transforms)
    for family in tiny.TINY
    for name, (layout, transforms) in LAYOUTS.items()
}
CELLS |= {
    f"{family}, {kind}": cell(
        family, layout, spread(kind, family), data_parallel(), pack={"segment_multiple": 4} if kind == "ring" else {}
    )
    for family in tiny.TINY
    for kind, layout in KINDS.items()
    if not (kind == "ring" and is_recurrent(family))
}
CELLS |= {f"{family}, ep": cell(family, Layout(dp=2, ep=2), expert_parallel(), data_parallel(), KEEP) for family in MOE}

SLOW = {name for name in CELLS if name.endswith(", compiled")} - {"dense, compiled", "delta_moe, compiled"}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's compiler itself
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CELLS]
)
def test_a_whole_step_is_that_of_the_cpu(name: str) -> None:
    with emulated():
        check_cell(CELLS[name])
        assert kernels.calls["forward"] > 0 < kernels.calls["backward"]
        assert (kernels.calls["grouped_mm"] > 0) == tiny.has_experts(CELLS[name].family)
