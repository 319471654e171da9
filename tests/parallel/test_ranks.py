"""Real ranks over gloo: a sample of the matrix, an independent count of collectives, and compiled programs."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from mmfn.parallel.mesh.layout import Layout, distributed_mesh
from mmfn.parallel.program import Transform
from mmfn.parallel.transforms.compiled import compiled
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.transforms.vocabulary_parallel import vocabulary_parallel
from tests.parallel.conformance import Cell, check_outcome, outcome, run_cell, spread
from tests.parallel.ranks import run_ranks

CELLS = {
    cell.name: cell
    for cell in (
        Cell(layout=Layout(dp=4), name="fsdp", transforms=(data_parallel(),), batch="first half without images"),
        Cell(layout=Layout(dp=4), name="remat", transforms=(data_parallel(), remat("full"))),
        Cell(layout=Layout(replicate=2, dp=2), name="hsdp", transforms=(data_parallel(), remat("full")), family="moe"),
        Cell(layout=Layout(replicate=4), name="ddp", transforms=(data_parallel(),), batch="first half unsupervised"),
        Cell(layout=Layout(dp=4), name="released", transforms=(data_parallel(reshard_after_forward=True),)),
        Cell(layout=Layout(dp=4), name="sharded head", transforms=(data_parallel(), vocabulary_parallel())),
        Cell(
            layout=Layout(dp=4),
            name="dropout",
            transforms=(data_parallel(), remat("full")),
            trained="lora with dropout",
        ),
        Cell(  # of several ranks, whose neighbours to either side differ
            layout=Layout(cp=4),
            name="ring",
            transforms=(data_parallel(), spread("ring", "toy")),
            family="toy",
            pack={"segment_multiple": 8},
        ),
        Cell(  # heads and rows are exchanged in one process group, and rows alone are kept
            layout=Layout(dp=2, cp=2, ulysses=2, ep=2),
            name="exchange kept",
            transforms=(
                data_parallel(),
                spread("ulysses"),
                expert_parallel(),
                remat("selective", save=("exchange",)),
            ),
            family="moe",
        ),
    )
}
OPERATORS = {
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
}


def eager_steps(names: Sequence[str]) -> list[tuple[dict[str, Tensor], dict[str, int]]]:
    """Runs on every rank: the outcome of each cell, and what torch counts as collectives."""
    out = []
    for name in names:
        cell = CELLS[name]
        mesh = distributed_mesh(cell.layout)
        mode = CommDebugMode()
        mode.comm_registry.add(torch.ops._c10d_functional.all_gather_into_tensor_out)  # which it does not know
        with mode:
            found = outcome(cell, mesh)
        counts = {str(op.__name__): n for op, n in mode.get_comm_counts().items()}
        out.append((found, counts))
    return out


@pytest.mark.dist
def test_eager_steps_and_their_collectives() -> None:
    ranks = run_ranks(4, eager_steps, list(CELLS))
    for index, cell in enumerate(CELLS.values()):
        names = (call.name for call in run_cell(cell).calls[0])
        counted = Counter("all_to_all" if name == "shift" else name for name in names)
        for rank in ranks:
            found, counts = rank[index]
            check_outcome(cell, found)
            assert {OPERATORS[name]: n for name, n in counts.items()} == counted


# ---- compiled

TWO = Layout(dp=2)
COMPILED: dict[str, tuple[str, tuple[Transform, ...], int]] = {
    # kind, other transforms, graphs: with "layer" one for text blocks, one for vision blocks, one update (not on_host)
    "layer": ("layer", (data_parallel(), remat("full")), 3),
    "layer plain": ("layer", (data_parallel(),), 3),
    "layer selective": ("layer", (data_parallel(), remat("selective", save=("attention", "matmul"))), 3),
    "layer sharded head": ("layer", (data_parallel(), vocabulary_parallel()), 3),
    "layer kept": ("layer", (data_parallel(keep_gathered=True), remat("full")), 3),
    "layer hosted": ("layer", (data_parallel(), remat("full"), offload("parameters")), 2),
    "layer hosted kept": ("layer", (data_parallel(keep_gathered=True), remat("full"), offload("parameters")), 2),
    "step": ("step", (data_parallel(),), 1),
    "step remat": ("step", (data_parallel(), remat("full")), 1),
    "layer dropout": ("layer", (data_parallel(), remat("full")), 3),
    "step dropout": ("step", (data_parallel(), remat("full")), 1),
    # vision with windows and with frames, which are fewer, sound, dense, experts, the update
    "layer toy": ("layer", (data_parallel(), remat("full")), 6),
}
FAMILY = {"layer toy": "toy"}  # of a case, where it is not "small"
TRAINED = dict.fromkeys(("layer dropout", "step dropout"), "lora with dropout")  # of a case, where it is not all


def compiled_cell(name: str, transforms: tuple[Transform, ...]) -> Cell:
    """The cell of a case."""
    family, trained = FAMILY.get(name, "small"), TRAINED.get(name, "all")
    return Cell(layout=TWO, name=name, transforms=transforms, family=family, trained=trained)


def compiled_steps(name: str, backend: str, is_first: bool) -> tuple[dict[str, Tensor], int]:
    """Runs on every rank: the outcome of a compiled step and the number of its graphs."""
    kind, transforms, _ = COMPILED[name]
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: Sequence[Tensor], **options: Any) -> Callable[..., Any]:
        nonlocal graphs
        run: Callable[..., Any] = torch._dynamo.lookup_backend(backend)(graph, inputs, **options)
        graphs += 1  # not before: torch may break off and compile the same graph again, once it knows its constants
        return run

    compile_ = compiled(kind, backend=count)
    order = (compile_, *transforms) if is_first else (*transforms, compile_)
    return outcome(compiled_cell(name, order), distributed_mesh(TWO)), graphs


SLOW = pytest.mark.slow
CASES = [
    ("layer", "aot_eager", True),
    pytest.param("layer", "aot_eager", False, marks=SLOW),
    pytest.param("layer", "inductor", True, marks=SLOW),
    pytest.param("layer plain", "aot_eager", False, marks=SLOW),
    pytest.param("layer selective", "aot_eager", False, marks=SLOW),
    pytest.param("layer sharded head", "aot_eager", False, marks=SLOW),
    pytest.param("layer kept", "aot_eager", False, marks=SLOW),
    pytest.param("layer hosted", "aot_eager", False, marks=SLOW),
    pytest.param("layer hosted", "inductor", True, marks=SLOW),
    pytest.param("layer hosted kept", "aot_eager", False, marks=SLOW),
    pytest.param("step", "aot_eager", False, marks=SLOW),
    pytest.param("step remat", "aot_eager", False, marks=SLOW),
    pytest.param("step remat", "aot_eager", True, marks=SLOW),
    pytest.param("layer dropout", "aot_eager", True, marks=SLOW),
    pytest.param("layer dropout", "inductor", False, marks=SLOW),
    pytest.param("step dropout", "aot_eager", False, marks=SLOW),
    pytest.param("layer toy", "aot_eager", False, marks=SLOW),
]


@pytest.mark.dist
@pytest.mark.parametrize(("name", "backend", "is_first"), CASES)
def test_compiled_equals_one_device(name: str, backend: str, is_first: bool) -> None:
    """Whatever the order of `compiled` among the transforms."""
    cell = compiled_cell(name, ())
    for found, graphs in run_ranks(2, compiled_steps, name, backend, is_first):
        check_outcome(cell, found)
        assert graphs == COMPILED[name][2]
