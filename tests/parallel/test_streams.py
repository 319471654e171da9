"""Work on streams beside the computation: whatever order a device chooses, values are those of one stream."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mmfn import tree
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.planning.alike import recording_mesh
from mmfn.parallel.program import Program, Transform, lower, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.precision import precision
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.weights.buckets import Bucket
from mmfn.parallel.weights.gradient_sums import GradientSums
from mmfn.parallel.weights.sharding import local, shard_params
from mmfn.parallel.weights.streams import Arrival
from mmfn.spec import ZEROS, spec
from tests.parallel.stream_clocks import Clocks, RaceError, Stream, streamed, wired

NUM_BLOCKS, WIDTH = 4, 6
SPECS = [{"w": spec((WIDTH, 4), "mlp embed", ZEROS), "b": spec((WIDTH,), "mlp", ZEROS)} for _ in range(NUM_BLOCKS)]
PAIR, COPIES, BOTH = Layout(dp=2), Layout(replicate=2), Layout(replicate=2, dp=2)
NARROW = precision(compute=torch.bfloat16)
CAT = "aten.cat"


def two_steps(clocks: Clocks | None, layout: Layout, *transforms: Transform) -> list[Tensor]:
    """The parameters behind two steps of a chain of blocks, updated where they lie: on clocks, or the CPU as it is."""
    with nullcontext() if clocks is None else streamed(clocks):
        mesh = recording_mesh(layout, 0)
        mesh = mesh if clocks is None else wired(mesh, clocks)
        program = lower(pipe(Program.of(SPECS, mesh=mesh), *transforms))
        g = torch.Generator().manual_seed(0)
        whole = tree.map(lambda s: torch.randn(s.shape, generator=g), SPECS)
        params = tree.map(lambda x: x.detach().requires_grad_(), shard_params(whole, SPECS, mesh))

        def block(own: Any, x: Tensor) -> tuple[Tensor, None]:
            weights = program.ops.gather(own)
            w = weights["w"]
            return torch.tanh(x @ w @ w.t() + weights["b"]), None

        for _ in range(2):
            sums = GradientSums()
            x = torch.full((2, WIDTH), 0.3, dtype=program.weights.compute)
            x, _, _ = program.ops.stack(program.ops.layer, block, program.enter(params, params, sums), x)
            torch.autograd.grad(x.float().square().sum(), tree.leaves(params), allow_unused=True)
            grads = sums.take(is_wide=False)
            with torch.no_grad():
                for path, leaf in tree.items(params):
                    local(leaf).sub_(grads.pop(path), alpha=0.1)
        return [local(leaf).detach() for leaf in tree.leaves(params)]


CASES: dict[str, tuple[Layout, tuple[Transform, ...], int]] = {  # and how often a block is gathered ahead, in a step
    "plain": (PAIR, (data_parallel(),), 1),
    "copies": (COPIES, (data_parallel(),), 1),
    "both": (BOTH, (data_parallel(), NARROW), 1),
    "remat": (PAIR, (data_parallel(), remat("full"), NARROW), 2),
    "copies, remat": (COPIES, (data_parallel(), remat("full")), 2),
    "released": (BOTH, (data_parallel(reshard_after_forward=True),), 2),
    "not ahead": (PAIR, (data_parallel(prefetch=False),), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_sent_is_packed_beside_the_computation(name: str) -> None:
    layout, transforms, times = CASES[name]
    clocks = Clocks()
    params = two_steps(clocks, layout, *transforms)
    packed = {stream: n for (stream, operator), n in clocks.given.items() if operator == CAT}
    assert packed.get("side", 0) == 2 * NUM_BLOCKS * times
    assert (packed.get("compute", 0) > 0) == (times == 0)
    want = two_steps(None, layout, *transforms)
    assert all(torch.equal(x, y) for x, y in zip(params, want, strict=True))


# ---- that the clocks find what is wrong


@contextmanager
def side_that_does_not_wait() -> Iterator[None]:
    inner = Stream.wait_stream
    with patch.object(Stream, "wait_stream", lambda self, other: self.name == "side" or inner(self, other)):
        yield


@contextmanager
def arrival_that_is_not_waited_for() -> Iterator[None]:
    with patch.object(Arrival, "wait", lambda self: None):
        yield


@contextmanager
def sent_memory_that_is_not_held() -> Iterator[None]:
    inner = Bucket.issue
    with patch.object(Bucket, "issue", lambda self, shards: (inner(self, shards)[0], torch.empty(0))):
        yield


@contextmanager
def gather_that_is_not_waited_for() -> Iterator[None]:
    with patch("tests.parallel.stream_clocks.Wired.wait", lambda self, x: x):
        yield


@pytest.mark.parametrize(
    ("wrong", "name", "what"),
    [
        (side_that_does_not_wait, "plain", "reads, for"),
        (arrival_that_is_not_waited_for, "copies", "compute reads, for"),
        (sent_memory_that_is_not_held, "plain", "side reuses, for"),
        (gather_that_is_not_waited_for, "plain", "compute reads, for"),
    ],
)
def test_each_wait_and_each_held_reference_is_needed(wrong: Any, name: str, what: str) -> None:
    layout, transforms, _ = CASES[name]
    with wrong(), pytest.raises(RaceError, match=what):
        two_steps(Clocks(), layout, *transforms)
