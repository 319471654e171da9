"""The conformance harness: one training step of a tiny model on a mesh against the same step on one device.

A `Cell` is a line of the matrix in `test_conformance.py`. Its samples are dealt to the batch ranks in order, one
micro-batch each; one device takes all of them in one batch. Everything is float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

import mmfn
from mmfn import tree
from mmfn.batch import Batch, Sample, is_on_host
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import Call, World, run_virtual
from mmfn.parallel.program import Program, Transform, pipe
from mmfn.parallel.transforms.context_parallel import context_parallel
from mmfn.parallel.weights.sharding import shard_params, whole
from mmfn.train.optim import adamw, chain, clip_by_global_norm, on_host
from mmfn.train.schedule import schedule
from mmfn.train.step import State, Step, init_state, make_step
from tests import tiny
from tests.batches import packed, wide

NUM_SAMPLES = 8
PAD_TOKENS = 48  # a batch rank's tokens are padded to a multiple of this, which up to 8 cp ranks of any kind divide
Move = Callable[[Tensor], Tensor]
TOKEN_AXES = ("cp", "ring", "ulysses", "ep")  # what travels along them depends on the batch
RTOL = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 6e-2}  # of a leaf's largest value


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line of the matrix.

    `transforms` come in any order and `name` says what they are. `family`: a name in `tiny.TINY`. `batch`: a name in
    `BATCHES`. `pack`: further arguments of `tests.batches.packed`. `dtype`: the narrowest one in use, which sets the
    tolerance. `num_layers`: text blocks, to count what one costs. `trained`: a name in `tiny.TRAINED`.
    """

    layout: Layout
    name: str
    transforms: tuple[Transform, ...]
    family: str = "dense"
    batch: str = "mixed"
    pack: Mapping[str, int] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    num_layers: int = 2
    trained: str = "all"

    def __str__(self) -> str:
        return f"{self.family}, {self.layout}, {self.name}, {self.batch}"


def spread(kind: str, family: str = "dense") -> Transform:
    """`context_parallel` for a tiny model."""
    model = tiny.model_of(family)
    sizes = model.cfg.decoder
    towers = model.family.towers(model.cfg)
    is_recurrent = model.family.is_recurrent(model.cfg)
    heads = {"num_heads": sizes.num_heads, "num_kv_heads": sizes.num_kv_heads}
    return context_parallel(kind, **heads, towers=towers, is_recurrent=is_recurrent)


BATCHES: dict[str, Callable[[int], tuple[Sequence[int], bool]]] = {
    # sample i of NUM_SAMPLES -> its media, as numbers of kinds that the model reads, and whether it is supervised
    "mixed": lambda i: (((), (0,), (1, 0), (0, 2))[i % 4], True),
    "text": lambda i: ((), True),
    "video": lambda i: ((1,), True),
    "first half without images": lambda i: ((0,) * (2 * i // NUM_SAMPLES), True),
    "first half unsupervised": lambda i: ((0,) * (i % 2), 2 * i >= NUM_SAMPLES),
    "unsupervised": lambda i: ((0,) * (i % 2), False),  # of a model with experts the balancing loss is left
}


def batch_of(cell: Cell, index: int = 0, size: int = 1) -> Batch:
    """What batch rank `index` of `size` gets before `Program.split`: its samples, packed, in float64."""
    model = tiny.model_of(cell.family, cell.num_layers)
    mine = range(NUM_SAMPLES * index // size, NUM_SAMPLES * (index + 1) // size)
    rows = [_sample(model, i, *BATCHES[cell.batch](i)) for i in mine]
    used = packed(model, rows, **cell.pack).tokens_T.numel()
    num_segments = -(-NUM_SAMPLES // size)  # the same on every rank
    sizes = {"tokens": -(-used // PAD_TOKENS) * PAD_TOKENS, "segments": num_segments}
    return wide(packed(model, rows, **(sizes | dict(cell.pack))))


def _sample(model: mmfn.Model, number: int, numbers: Sequence[int], is_supervised: bool) -> Sample:
    kinds = tiny.media_kinds(model.family, model.cfg)
    media = [kinds[i % len(kinds)] for i in numbers]
    return tiny.sample(model.family, model.cfg, number, media, is_supervised=is_supervised)


def prepared(cell: Cell, mesh: Mesh, *, donate: bool = True, to: Move = lambda x: x) -> tuple[Step, State, Batch]:
    """The step, its first state and this rank's share of the batch; `to`: where, and in what, they are computed."""
    model = tiny.model_of(cell.family, cell.num_layers)
    specs = tiny.TRAINED[cell.trained](model.family, model.cfg)
    program = pipe(Program.of(specs, mesh=mesh), *cell.transforms)
    params = tree.map(to, tiny.with_adapters(model.params, specs))
    if mesh.layout.world > 1:
        params = shard_params(params, program.specs, mesh)
    # With beta1 = 0 the first moment is the clipped gradient. A large eps keeps the update smooth where it is tiny.
    writer = adamw(betas=(0.0, 0.9), eps=1e-3, weight_decay=0.1)
    writer = on_host(writer, 500, what=("parameters",)) if program.weights.is_hosted else writer
    optimizer = chain(clip_by_global_norm(0.5), writer)
    rate = schedule("constant", peak=1e-2, num_steps=1)
    step = make_step(model.family, model.cfg, program, "per_token_loss", optimizer, schedule=rate, donate=donate)
    own = program.split(batch_of(cell, mesh["batch"].index, mesh["batch"].size))
    own = tree.map_with_path(lambda path, x: x if is_on_host(path) else to(x), own)
    return step, init_state(params, optimizer, specs), own


def outcome(cell: Cell, mesh: Mesh) -> dict[str, Tensor]:
    """One step as this rank of the mesh sees it: metrics, whole clipped gradients and whole updated parameters."""
    step, state, batch = prepared(cell, mesh)
    return values(*step(state, [batch]), mesh)


def values(state: State, metrics: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """What a step gave, by path."""
    found = {f"metrics/{name}": value for name, value in metrics.items()}
    for kind, leaves in (("gradients", state["opt"][1]["m"]), ("params", state["params"])):
        found |= {f"{kind}/{path}": whole(leaf, mesh) for path, leaf in tree.items(leaves)}
    return found


@cache
def _alone(family: str, batch: str, num_layers: int, trained: str) -> dict[str, Tensor]:
    plain = Cell(layout=Layout(), name="", transforms=(), family=family, batch=batch, num_layers=num_layers)
    return outcome(replace(plain, trained=trained), single_mesh())


def one_device(cell: Cell) -> dict[str, Tensor]:
    """The same step without mesh and transforms, on all samples in one batch packed without further arguments."""
    return _alone(cell.family, cell.batch, cell.num_layers, cell.trained)


def run_cell(cell: Cell) -> World:
    """The step on every rank, in one process."""
    return run_virtual(cell.layout, lambda mesh: outcome(cell, mesh))


def check_outcome(cell: Cell, found: Mapping[str, Tensor]) -> None:
    """Assert that a rank's outcome is one device's; every value relative to the largest of its leaf."""
    expected = one_device(cell)
    assert found.keys() == expected.keys()
    norm = expected["metrics/grad_norm"]
    if cell.batch == "unsupervised":
        assert bool(norm > 1e-3) == tiny.has_experts(cell.family), "the balancing loss is all there is"
    else:
        assert norm > 0.5, "clipping is part of the step"
    for name, want in expected.items():
        error = (found[name].double() - want).abs().max() if want.numel() else torch.zeros(())
        assert error <= RTOL[cell.dtype] * tiny.scale_of(want, cell.dtype), f"{cell}: {name} is off by {error:.1e}"


def check_cell(cell: Cell) -> World:
    """Assert all that holds for every cell: the outcome of all ranks, bitwise the same, by the same collectives."""
    world = run_cell(cell)
    check_outcome(cell, world.results[0])
    for rank, found in enumerate(world.results):
        assert all(torch.equal(x, found[name]) for name, x in world.results[0].items()), f"{cell}: rank {rank} differs"
    assert len({tuple(sequence(calls)) for calls in world.calls}) == 1, f"{cell}: ranks call different collectives"
    return world


def sequence(calls: Sequence[Call]) -> list[tuple[str, ...]]:
    """Collectives in order. Shapes only of parameters: tokens, features and exchanged rows differ between groups."""
    return [(c.axis, c.name, c.site, *(map(str, c.shape) if c.axis not in TOKEN_AXES else ())) for c in calls]
