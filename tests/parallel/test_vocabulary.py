"""A head that stays sharded: values, gradients and collectives against torch's cross entropy on one device."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmfn.batch import IGNORE
from mmfn.ops.cross_entropy import chunk_rows
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import run_virtual, virtual
from mmfn.parallel.program import Program, lower, pipe
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.precision import precision
from mmfn.parallel.transforms.vocabulary_parallel import Slice, sliced_cross_entropy, vocabulary_parallel
from mmfn.parallel.weights.sharding import rows, shard_params, whole
from mmfn.spec import normal, spec
from tests.parallel.conformance import Cell, check_cell, check_outcome, run_cell
from tests.tiny import model_of

D = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"chunk": 2},
    "z-loss and smoothing": {"z_loss": 0.05, "label_smoothing": 0.2, "chunk": 3},
}
TOKENS = {  # of each rank: how many, and one in how many is supervised
    "alike": [(12, 2), (12, 2), (12, 2)],
    "uneven": [(40, 1), (3, 3), (9, 2)],
    "two without labels": [(7, 0), (5, 1), (4, 0)],
    "none": [(7, 0), (5, 0), (0, 0)],
}


def head_of(num_vocabulary: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(num_vocabulary, D, generator=g, dtype=torch.float64),
        torch.randn(num_vocabulary, generator=g, dtype=torch.float64),
    )


def tokens_of(index: int, num_tokens: int, every: int, num_vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, labels and weights of a rank."""
    g = torch.Generator().manual_seed(index + 1)
    x_TD = torch.randn(num_tokens, D, generator=g, dtype=torch.float64)
    labels_T = torch.randint(num_vocabulary, (num_tokens,), generator=g)
    is_supervised_T = torch.arange(num_tokens) % every == 0 if every else torch.zeros(num_tokens, dtype=torch.bool)
    weights_T = torch.rand(num_tokens, generator=g, dtype=torch.float64)
    return x_TD, torch.where(is_supervised_T, labels_T, IGNORE), weights_T


def part_of(mesh: Mesh, num_vocabulary: int) -> Slice:
    axis = mesh["shard"]
    start = rows(num_vocabulary, axis.size, axis.index)[0]
    return Slice(axis=axis, num_vocabulary=num_vocabulary, start=start, rows=chunk_rows(num_vocabulary))


def run_rank(
    mesh: Mesh, num_vocabulary: int, sizes: Sequence[tuple[int, int]], has_bias: bool, settings: Any
) -> tuple[Tensor, ...]:
    """This rank's `(loss, ce, gradients of x, its head rows, its bias rows)`."""
    axis = mesh["shard"]
    own = slice(*rows(num_vocabulary, axis.size, axis.index))
    weight_VD, bias_V = (leaf[own].clone().requires_grad_() for leaf in head_of(num_vocabulary))
    x_TD, labels_T, weights_T = tokens_of(axis.index, *sizes[axis.index], num_vocabulary)
    x_TD.requires_grad_()
    given = settings | ({"bias_V": bias_V} if has_bias else {})
    part = part_of(mesh, num_vocabulary)
    loss, ce = sliced_cross_entropy(x_TD, weight_VD, labels_T, weights_T, part=part, **given)
    leaves = (x_TD, weight_VD, bias_V) if has_bias else (x_TD, weight_VD)
    assert not ce.requires_grad
    return loss.detach(), ce, *torch.autograd.grad(-1.7 * loss, leaves)


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("num_vocabulary", [29, 7, 3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_value_and_gradients_are_those_of_torch(setting: str, num_vocabulary: int, tokens: str, has_bias: bool) -> None:
    settings, sizes = SETTINGS[setting], TOKENS[tokens]
    found = virtual(Layout(dp=3), lambda mesh: run_rank(mesh, num_vocabulary, sizes, has_bias, settings))
    weight_VD, bias_V = (leaf.requires_grad_() for leaf in head_of(num_vocabulary))
    parts = [tokens_of(i, *size, num_vocabulary) for i, size in enumerate(sizes)]
    xs = [x_TD.requires_grad_() for x_TD, _, _ in parts]
    labels_T, weights_T = (torch.cat([p[i] for p in parts]) for i in (1, 2))
    logits_TV = F.linear(torch.cat(xs), weight_VD, bias_V if has_bias else None)
    cross_entropy = partial(F.cross_entropy, logits_TV, labels_T, ignore_index=IGNORE, reduction="none")
    squares_T = torch.where(labels_T == IGNORE, 0.0, logits_TV.logsumexp(-1).square())
    losses_T = cross_entropy(label_smoothing=settings.get("label_smoothing", 0.0))
    expected = ((losses_T + settings.get("z_loss", 0.0) * squares_T) * weights_T).sum()
    close = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-11)
    close(sum(own[0] for own in found), expected.detach())
    close(sum(own[1] for own in found), (cross_entropy() * weights_T).sum().detach())
    leaves = (*xs, weight_VD, bias_V) if has_bias else (*xs, weight_VD)
    grads = torch.autograd.grad(-1.7 * expected, leaves)
    for own, want in zip(found, grads, strict=False):
        close(own[2], want)
    for i, want in enumerate(grads[len(xs) :]):
        close(torch.cat([own[3 + i] for own in found]), want)


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_narrow_dtypes_are_close_to_float64(smoothing: float) -> None:
    V, size = 40, (30, 1)

    def run(mesh: Mesh, dtype: torch.dtype) -> tuple[Tensor, ...]:
        axis = mesh["shard"]
        weight_VD = head_of(V)[0][slice(*rows(V, axis.size, axis.index))].bfloat16().to(dtype).requires_grad_()
        x_TD, labels_T, weights_T = tokens_of(axis.index, *size, V)
        x_TD = (x_TD / 8).bfloat16().to(dtype).requires_grad_()  # probabilities that smoothing's share nearly cancels
        settings = {"part": part_of(mesh, V), "chunk": 4, "label_smoothing": smoothing}
        loss, _ = sliced_cross_entropy(x_TD, weight_VD, labels_T, weights_T.float(), **settings)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        return loss.detach(), *torch.autograd.grad(loss, (x_TD, weight_VD))

    narrow, wide = (virtual(Layout(dp=2), partial(run, dtype=dtype)) for dtype in (torch.bfloat16, torch.float64))
    for a, b in zip([x for own in narrow for x in own], [x for own in wide for x in own], strict=True):
        assert (a.double() - b).norm() <= 0.003 * b.norm()


class Products(TorchDispatchMode):
    """Counts matrix products, and the values of the largest tensor."""

    is_eager = True

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize(
    ("x_needs", "head_needs", "products"), [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)]
)
def test_only_the_gradients_asked_for_are_computed(x_needs: bool, head_needs: bool, products: int) -> None:
    """And of a frozen head no gradient travels; no rank ever holds the head or the logits of its tokens."""
    V = 64

    def run(mesh: Mesh) -> tuple[int, int]:
        axis = mesh["shard"]
        weight_VD = head_of(V)[0][slice(*rows(V, axis.size, axis.index))].requires_grad_(head_needs)
        x_TD, labels_T, weights_T = tokens_of(axis.index, 6, 1, V)
        with Products() as seen:
            loss, _ = sliced_cross_entropy(
                x_TD.requires_grad_(x_needs), weight_VD, labels_T, weights_T, part=part_of(mesh, V), chunk=2
            )
        assert loss.requires_grad == (x_needs or head_needs)
        return seen.products, seen.largest

    world = run_virtual(Layout(dp=2), run)
    for found, largest in world.results:
        assert found == 3 * products  # three chunks of two rows from each rank
        assert largest <= V * D // 2
    for calls in world.calls:
        names = [call.name for call in calls]
        assert names.count("reduce_scatter") == (3 if x_needs else 0)
        assert names.count("all_gather") == 3 + 3 * 2  # counts, labels, weights; rows and maxima of each chunk
        assert names.count("all_reduce") == 3


def test_a_label_beyond_the_vocabulary_is_refused() -> None:
    def run(mesh: Mesh) -> None:
        x_TD, labels_T, weights_T = tokens_of(mesh["shard"].index, 6, 1, 9)
        weight_VD = torch.zeros(5 - mesh["shard"].index, D, dtype=torch.float64)
        sliced_cross_entropy(x_TD, weight_VD, labels_T + 9, weights_T, part=part_of(mesh, 9))

    with pytest.raises(ValueError, match="the head has 9 rows"):
        virtual(Layout(dp=2), run)


# ---- as a transform: one step of a model


CELLS = [
    Cell(layout=layout, name="sharded head", transforms=(vocabulary_parallel(), data_parallel()), family=family)
    for layout, family in ((Layout(dp=2), "small"), (Layout(dp=4), "dense"))
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_step_of_a_model(cell: Cell) -> None:
    """With a head tied to the embedding; a gathered leaf and one that stays add their gradients up."""
    world = check_cell(cell)
    sites = {(call.site, call.name) for calls in world.calls for call in calls}
    assert ("vocabulary", "reduce_scatter") in sites


def test_replicas_add_their_gradients_up() -> None:
    cell = replace(CELLS[0], layout=Layout(replicate=2, dp=2), batch="first half unsupervised")
    for found in run_cell(cell).results:
        check_outcome(cell, found)


def test_a_head_of_its_own_is_never_gathered() -> None:
    """Its gradient comes back as the shard's, in the shard's dtype; computation has the program's."""
    V, specs = 10, {"head": {"weight": spec((10, D), "vocab embed", normal(0.1))}}
    whole_head = {"head": {"weight": head_of(V)[0]}}

    def run(mesh: Mesh) -> tuple[Tensor, Tensor]:
        given = (vocabulary_parallel(), data_parallel(), precision(compute=torch.float32))
        program = lower(pipe(Program.of(specs, mesh=mesh), *given))
        params = shard_params(whole_head, specs, mesh)
        leaf = params["head"]["weight"].detach().requires_grad_()
        used = program.ops.gather_head({"weight": leaf})["weight"]
        assert used.dtype == torch.float32
        assert used.shape == (5, D)
        assert program.ops.gather({"weight": leaf})["weight"].shape == (V, D)
        (grad,) = torch.autograd.grad(used.double().square().sum() / 2, leaf)
        assert grad.placements == leaf.placements
        return whole(grad, mesh), grad.dtype

    for grad, dtype in virtual(Layout(replicate=2, dp=2), run):
        assert dtype == torch.float64
        torch.testing.assert_close(grad, 2 * whole_head["head"]["weight"].float().double(), rtol=1e-6, atol=0)


def test_the_identity_on_one_device() -> None:
    program = Program.of({"head": spec((4, 2), "vocab embed", normal(1.0))}, mesh=single_mesh())
    assert vocabulary_parallel()(program) is program


def test_refusals() -> None:
    model = model_of("dense")
    specs = model.family.specs(model.cfg)

    def small(mesh: Mesh) -> None:
        vocabulary_parallel()(Program.of({"head": spec((4, 2), "vocab embed", normal(1.0))}, mesh=mesh))

    def one_graph(mesh: Mesh) -> None:
        lower(pipe(Program.of(specs, mesh=mesh), vocabulary_parallel(), data_parallel(), compiled("step")))

    with pytest.raises(ValueError, match="a vocabulary of 4 leaves one of 3 ranks without a row"):
        virtual(Layout(dp=3), small)
    with pytest.raises(ValueError, match="a step with a sharded head is no single graph"):
        virtual(Layout(dp=2), one_graph)
