"""Two layers of experts with routings that are hard to spread, run on any mesh: for `test_expert_parallel.py`.

Every rank has tokens of its own; one device takes those of all ranks, one rank's after the other's.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from mmfn import ops as tables
from mmfn import tree
from mmfn.grad import value_and_grad
from mmfn.models.layers import moe
from mmfn.models.layers.balance import balance
from mmfn.parallel.mesh.layout import Layout, Mesh, distributed_mesh
from mmfn.parallel.program import Program, Transform, lower, pipe
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.weights.sharding import shard_params, whole
from mmfn.spec import init_params
from mmfn.tree import Tree
from tests.npu.table import on_emulated

CFG = moe.MoeConfig(d_model=7, d_ff=6, num_experts=8, num_chosen=2, init_std=0.6)
SPECS = [moe.specs(CFG), moe.specs(CFG)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`tokens[rank]`: how many it has; `valid[rank]`: how many of them are no padding.

    `is_mixed`: padding lies among the tokens, not behind them. `tie`: "router" prefers no expert, "rows" are all alike
    and every second expert is like the one before it.
    `liked`: experts that every token likes best; `disliked`: none does; `drawn`: experts that rank 0's tokens like.
    """

    tokens: tuple[int, ...]
    valid: tuple[int, ...]
    liked: tuple[int, ...] = ()
    disliked: tuple[int, ...] = ()
    drawn: tuple[int, ...] = ()
    is_mixed: bool = False
    tie: str = ""

    @staticmethod
    def of(world: int, name: str, *, is_even: bool = False) -> "Case":
        """The case of a name in `NAMES` for a number of ranks, all with equally many tokens if `is_even`."""
        tokens = tuple(12 if is_even else 5 + 3 * (rank % 4) for rank in range(world))
        valid = tuple(min(num - 1, 4 + 2 * (rank % 4)) for rank, num in enumerate(tokens))
        own: dict[str, Any] = {
            "uneven": {},
            "an expert without rows": {"disliked": (2, 5)},
            "all rows to the last rank": {"liked": (CFG.num_experts - 2, CFG.num_experts - 1), "valid": tokens},
            "one rank's rows to one rank": {"drawn": (0, 1)},
            "a rank of padding alone": {"valid": (valid[0], 0, *valid[2:])},
        }
        return Case(**{"tokens": tokens, "valid": valid, **own[name]})

    def params(self) -> Tree:
        """Whole weights; what makes experts liked is the router's weight of the first two channels."""
        params = init_params(SPECS, 0, torch.float64)
        for layer in params:
            weight_ED = layer["router"]["weight"]
            weight_ED[:, :2] = 0
            weight_ED[list(self.liked), 0] = 50
            weight_ED[list(self.disliked), 0] = -50
            weight_ED[list(self.drawn), 1] = 50
            if self.tie == "router":
                weight_ED.zero_()
            elif self.tie == "rows":
                weight_ED[1::2] = weight_ED[::2]
        return params

    def inputs(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """`(x_TD, is_real_T, weights_T)` of a rank, the last being those of its tokens in the loss."""
        T, g = self.tokens[rank], torch.Generator().manual_seed(rank)
        x_TD = torch.randn(T, CFG.d_model, generator=g, dtype=torch.float64)
        if self.tie == "rows":
            x_TD = x_TD[:1].repeat(T, 1)
        x_TD[:, 0], x_TD[:, 1] = 1, rank == 0
        is_real_T = torch.arange(T) < self.valid[rank]
        if self.is_mixed:
            is_real_T = is_real_T[torch.randperm(T, generator=g)]
        return x_TD, is_real_T, torch.rand(T, generator=g, dtype=torch.float64) * is_real_T

    def everything(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of all ranks."""
        x_TD, is_real_T, weights_T = map(torch.cat, zip(*map(self.inputs, range(len(self.tokens))), strict=True))
        return x_TD, is_real_T, weights_T


NAMES = (
    "uneven",
    "an expert without rows",
    "all rows to the last rank",
    "one rank's rows to one rank",
    "a rank of padding alone",
)


def block(params: Tree, x_TD: Tensor, is_real_T: Tensor, *, ops: tables.Ops) -> tuple[Tensor, Tree]:
    params = ops.gather(params)
    y_TD, router = moe.apply(params, x_TD, is_real_T, cfg=CFG, ops=ops)
    return x_TD + torch.cat([torch.zeros_like(y_TD[:, :2]), y_TD[:, 2:]], 1), router  # the first channels stay


def loss(params: Tree, is_real_T: Tensor, weights_T: Tensor, *, ops: tables.Ops) -> tuple[Tensor, Tree]:
    x_TD, outs, _ = ops.stack(ops.layer, partial(block, ops=ops), params["layers"], params["x"], is_real_T)
    aux = moe.total(outs)
    aux_loss = balance(aux, ops)
    value = weights_T @ x_TD.square().sum(1) + 0.3 * aux_loss
    return value, {"aux_loss": aux_loss, "counts_E": aux["counts_E"], "dropped": aux["dropped"], "y_TD": x_TD}


def run(program: Program, layers: Tree, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """This rank's share of the loss, its statistics and outputs, and all gradients, on a lowered program."""
    x_TD, is_real_T, weights_T = inputs
    with program.compiling():
        differentiate = value_and_grad(partial(loss, ops=program.ops), has_aux=True)
        (value, aux), grads = differentiate({"layers": layers, "x": x_TD}, is_real_T, weights_T)
    return {"loss": value, **aux, **{f"grad/{path}": leaf for path, leaf in tree.items(grads)}}


def build(mesh: Mesh, *transforms: Transform) -> Program:
    """The lowered program of a rank."""
    return lower(pipe(Program.of(SPECS, mesh=mesh), *transforms))


def on_mesh(program: Program, case: Case) -> dict[str, Tensor]:
    """`run` with this rank's tokens; shares are summed over ranks and gradients of parameters joined."""
    mesh = program.mesh
    found = run(program, shard_params(case.params(), SPECS, mesh), case.inputs(mesh["world"].index))
    summed = {name: mesh["world"].all_reduce(found[name], "test") for name in SHARES}
    return {name: whole(leaf, mesh) for name, leaf in found.items()} | summed


def on_one_device(case: Case) -> dict[str, Tensor]:
    """All tokens on one device, by the reference table."""
    return run(Program.of(SPECS, tables.reference()), case.params(), case.everything())


def check(case: Case, results: Sequence[dict[str, Tensor]]) -> None:
    """Assert that all ranks' results are one device's, to 1e-11 of the largest value of a tensor."""
    joined = {name: torch.cat([found[name] for found in results]) for name in ("y_TD", "grad/x")}
    for name, want in on_one_device(case).items():
        for rank, found in enumerate(results):
            error = (joined.get(name, found[name]) - want).abs().max()
            assert error <= 1e-11 * want.abs().max(), f"{case}, rank {rank}: {name} is off by {error:.1e}"


def on_real_ranks(layout: Layout, case: Case) -> dict[str, dict[str, Tensor]]:
    """`on_mesh` with each of `EAGER`, on one of several processes."""
    mesh = distributed_mesh(layout)
    return {name: on_mesh(build(mesh, *transforms), case) for name, transforms in EAGER.items()}


def compiled_on_real_ranks(
    layout: Layout, cases: Sequence[Case], name: str, backend: str
) -> tuple[int, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The number of graphs and the results of cases of one shape, one after the other, compiled and then eager."""
    mesh = distributed_mesh(layout)
    compiled_program = build(mesh, *EAGER[name], compiled("layer", backend=backend))
    results = [on_mesh(compiled_program, case) for case in cases]
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return num_graphs, results, [on_mesh(build(mesh, *EAGER[name]), case) for case in cases]


def exchanges_of_graphs(layout: Layout, case: Case, names: Sequence[str]) -> dict[str, list[dict[str, int]]]:
    """Operators of the graphs of a compiled layer, forward and backward, that exchange rows or read on the host."""
    mesh, found = distributed_mesh(layout), {}
    for name in names:
        counts: list[dict[str, int]] = []

        def watch(graph: torch.fx.GraphModule, inputs: Sequence[Tensor], counts: Any = counts) -> Any:
            targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
            ran = Counter(target.name() for target in targets)
            counts.append({op: ran[op] for op in (ALL_TO_ALL, READ) if ran[op]})
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=watch, partition_fn=min_cut_rematerialization_partition)
        on_mesh(build(mesh, *EAGER[name], compiled("layer", backend=backend)), case)
        found[name] = counts
    return found


ALL_TO_ALL, READ = "_c10d_functional::all_to_all_single", "aten::_local_scalar_dense"
SHARES = ("loss", "aux_loss", "counts_E", "dropped")
EAGER = {
    "dropless": (data_parallel(), expert_parallel()),
    "dropless, remat": (data_parallel(), expert_parallel(), remat("full")),
    "dropless, exchange kept": (data_parallel(), expert_parallel(), remat("selective", save=("exchange",))),
    "capacity": (data_parallel(), expert_parallel("capacity")),
    "capacity, exchange kept": (
        remat("selective", save=("experts", "exchange")),
        data_parallel(),
        expert_parallel("capacity"),
    ),
    "fused on emulated NPUs": (
        on_emulated,
        remat("selective", save=("experts", "exchange")),
        data_parallel(),
        expert_parallel(fused=True),
    ),
}


class Reads(threading.local):
    """What this thread's host reads of tensors, while the `with` lasts: names of methods in the order of calls."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.is_on = False

    def __enter__(self) -> list[str]:
        self.seen, self.is_on = [], True
        return self.seen

    def __exit__(self, *args: Any) -> None:
        self.is_on = False
