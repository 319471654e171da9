"""Programs and the compiled transforms, on a toy stack of blocks."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import ops
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.program import MAX_GRAPHS, Program, lower, pipe
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.data_parallel import data_parallel

D = 4
QUIET_INDUCTOR = "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"  # torch's own, on import


def block(params: Any, x_TD: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    y_TD = torch.tanh(x_TD @ params["w"]) * scale
    return x_TD + y_TD, y_TD.sum()


def layers(num: int = 3) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{"w": torch.randn(D, D, generator=g)} for _ in range(num)]


def stack(program: Program, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The last x and the sum of every layer's second output."""
    ops = lower(program).ops
    with program.compiling():
        x_TD, outs, _ = ops.stack(ops.layer, block, layers(), x_TD, torch.tensor(0.5))
    return x_TD, torch.stack(outs).sum()


class Counter:
    """A backend that counts the graphs it is given and runs them as they are."""

    graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return gm.forward


def test_of_and_pipe() -> None:
    program = Program.of({"a": 1})
    assert program.ops == ops.portable()
    assert program.compile == "none"
    table = replace(ops.reference(), psum=lambda x: x)
    assert Program.of(None, table).ops is table
    seen = pipe(program, lambda p: replace(p, notes=(*p.notes, "x")), lambda p: replace(p, notes=(*p.notes, "y")))
    assert seen.notes == ("x", "y")
    assert program.notes == ()  # the given program is unchanged


def test_none_is_the_identity() -> None:
    program = Program.of(None)
    assert compiled("none")(program) is program


def test_layer_is_one_graph_for_all_blocks_and_another_per_shape() -> None:
    torch._dynamo.reset()
    backend = Counter()
    program = pipe(Program.of(None), compiled("layer", backend=backend))
    assert program.notes == ("compiled('layer')",)
    for T in (5, 5, 7, 5, 7):
        x_TD = torch.randn(T, D)
        expected = stack(Program.of(None), x_TD)
        torch.testing.assert_close(stack(program, x_TD), expected)
    assert backend.graphs == 2


@pytest.mark.filterwarnings(QUIET_INDUCTOR)
def test_a_compiled_block_does_not_keep_what_it_can_compute_again() -> None:
    """Of a feed-forward layer the projections alone; torch's own setting keeps their product, too."""
    torch._dynamo.reset()
    T, F = 6, 10
    weights = [torch.randn(F, D).requires_grad_() for _ in range(3)]

    def feed_forward(x_TD: Tensor) -> Tensor:
        gate, up, down = weights
        return ops.portable().swiglu(x_TD @ gate.t(), x_TD @ up.t()) @ down

    def kept(run: Any, context: Any) -> int:
        shapes: list[torch.Size] = []

        def pack(x: Tensor) -> Tensor:
            shapes.append(x.shape)
            return x

        x_TD = torch.randn(T, D).requires_grad_()
        with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y_TD = run(x_TD)
            got = torch.autograd.grad(y_TD.sum(), (x_TD, *weights))
        expected = torch.autograd.grad(feed_forward(x_TD).sum(), (x_TD, *weights))
        torch.testing.assert_close(got, expected)
        return shapes.count(torch.Size((T, F))) + shapes.count(torch.Size((F, T)))

    program = pipe(Program.of(None), compiled("layer", backend="aot_eager_decomp_partition"))
    assert kept(program.jit(feed_forward), program.compiling()) == 2
    torch._dynamo.reset()
    assert kept(program.jit(feed_forward), nullcontext()) == 3


def test_more_buckets_than_torch_allows_by_itself() -> None:
    torch._dynamo.reset()
    backend = Counter()
    program = pipe(Program.of(None), compiled("layer", backend=backend))
    for T in range(2, 13):
        stack(program, torch.randn(T, D))
    assert torch._dynamo.config.recompile_limit < backend.graphs == 11 < MAX_GRAPHS


def test_layer_wraps_the_layer_it_finds() -> None:
    """A hook of the table (offload) stays inside of the graph."""
    torch._dynamo.reset()
    base = ops.portable()
    doubled = replace(base, layer=lambda run, p, *xs: ops.call_layer(run, {"w": 2 * p["w"]}, *xs))
    program = pipe(Program.of(None, doubled), compiled("layer", backend="eager"))
    x_TD = torch.randn(3, D)
    torch.testing.assert_close(stack(program, x_TD), stack(Program.of(None, doubled), x_TD))
    assert not torch.allclose(stack(program, x_TD)[0], stack(Program.of(None), x_TD)[0])


def test_step_leaves_ops_alone_and_settings_last_for_the_call() -> None:
    program = pipe(Program.of(None), compiled("step"))
    assert program.ops == ops.portable()
    assert program.compile == "step"
    assert lower(program).ops == program.ops
    config = torch._dynamo.config
    before = (config.trace_autograd_ops, config.recompile_limit)
    with program.compiling():
        assert (config.trace_autograd_ops, config.recompile_limit) == (True, MAX_GRAPHS)
    assert (config.trace_autograd_ops, config.recompile_limit) == before


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's compiler itself
@pytest.mark.filterwarnings(QUIET_INDUCTOR)
def test_layer_with_inductor_forward_and_backward() -> None:
    torch._dynamo.reset()
    x_TD = torch.randn(5, D)
    results = []
    for kind in ("none", "layer"):
        leaf = x_TD.clone().requires_grad_()
        value = stack(pipe(Program.of(None), compiled(kind)), leaf * 1)[1]
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("kind", ["layer", "step"])
def test_virtual_ranks_compile_nothing(kind: str) -> None:
    def run(mesh: Mesh) -> None:
        lower(pipe(Program.of(None, mesh=mesh), data_parallel(), compiled(kind, backend="eager")))

    with pytest.raises(ValueError, match=rf"compiled\('{kind}'\) needs real ranks, .* torchrun: .* leave compiled out"):
        virtual(Layout(dp=2), run)


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="compile kind 'layers' is unknown; use one of none, layer, step"):
        compiled("layers")

    class Old:
        """The configuration of a torch that cannot trace autograd.grad."""

    monkeypatch.setattr(torch._dynamo, "config", Old())
    with pytest.raises(ValueError, match=r"needs a torch whose compiler traces autograd.grad, got .* 'layer'"):
        compiled("step")
