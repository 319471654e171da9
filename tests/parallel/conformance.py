"""The conformance harness: one training step of a tiny model on a mesh against the same step on one device.

A `Cell` is a line of the matrix in `test_conformance.py`. Its samples are dealt to the batch ranks in order, one
micro-batch each; one device takes all of them in one batch. Everything is float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

import mmfn
from mmfn import rng, tree
from mmfn.batch import IGNORE, IMAGE, TEXT, VIDEO, Batch, Media, Sample
from mmfn.lora import add_adapters, lora
from mmfn.models import family
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import Call, World, run_virtual
from mmfn.parallel.program import Program, Transform, pipe
from mmfn.parallel.weights.sharding import shard_params, whole
from mmfn.spec import freeze
from mmfn.train.optim import adamw, chain, clip_by_global_norm, on_host
from mmfn.train.schedule import schedule
from mmfn.train.step import State, Step, init_state, make_step
from mmfn.tree import Tree
from tests.batches import packed, wide

NUM_SAMPLES = 8
PAD_TOKENS = 48  # a batch rank's tokens are padded to a multiple of this, which up to 8 cp ranks of any kind divide
TOKEN_AXES = ("cp", "ring", "ulysses", "ep")  # what travels along them depends on the batch
RTOL = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 6e-2}  # of a leaf's largest value

IMAGE_ID, VIDEO_ID, FIRST_WORD, NUM_WORDS = 1, 2, 5, 61
CONFIG = {
    "model_type": "qwen3_vl",
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": NUM_WORDS,
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "out_hidden_size": 20,
        "num_position_embeddings": 9,
        "deepstack_visual_indexes": [0],
    },
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "router_aux_loss_coef": 0.1}
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": CONFIG,
    "small": {**CONFIG, "vision_config": {**CONFIG["vision_config"], "depth": 1, "deepstack_visual_indexes": []}},
    "moe": {**CONFIG, "model_type": "qwen3_vl_moe", "text_config": {**CONFIG["text_config"], **EXPERTS}},
}

TOWERS = family("qwen3_vl").towers(family("qwen3_vl").config_from_hf(CONFIG))
TRAINED: dict[str, Callable[[Tree], Tree]] = {  # specs -> specs: what is trained
    "all": lambda specs: specs,
    "decoder": lambda specs: freeze(specs, [r"vision/.*", r"text/embed/.*"]),
    "second block": lambda specs: freeze(specs, [r"vision/.*", r"text/(embed|norm|layers/0)/.*"]),
    "lora": lambda specs: lora(specs, rank=3, alpha=2.0, targets=[r"text/layers/\d+/attention/.", r".*/experts/.*"]),
    "lora of both": lambda specs: lora(
        specs, rank=2, alpha=2.0, targets=[r".*/(qkv|q|o)"], is_rs=True, keep=[r"text/norm/weight"]
    ),
    "lora of the tower": lambda specs: lora(specs, rank=4, alpha=16.0, targets=[r"vision/layers/\d/mlp/up"]),
    "lora with dropout": lambda specs: lora(
        specs, rank=3, alpha=4.0, targets=[r".*/attention/(qkv|q|o)", r"vision/(merger|deepstack/0)/up"], dropout=0.3
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line of the matrix.

    `transforms` come in any order and `name` says what they are. `batch`: a name in `BATCHES`. `pack`: further
    arguments of `tests.batches.packed`. `dtype`: the narrowest one in use, which sets the tolerance. `num_layers`: text
    blocks, to count what one costs. `trained`: a name in `TRAINED`.
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


@cache
def model_of(family: str, num_layers: int) -> mmfn.Model:
    """A model whose weights, biases and norms all matter."""
    config = FAMILIES[family]
    text = {**config["text_config"], "num_hidden_layers": num_layers}
    model = mmfn.init({**config, "text_config": text}, seed=0)
    g = torch.Generator().manual_seed(1)

    def draw(leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=g, dtype=torch.float64)
        return leaf + 0.1 * noise if leaf.ndim == 1 else noise * leaf.shape[-1] ** -0.5

    return replace(model, params=tree.map(draw, model.params))


def _sample(cfg: Any, seed: int, kinds: Sequence[int], *, supervised: bool) -> Sample:
    """Words, then media of the given kinds, each followed by words; about half the words are supervised."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    def words() -> tuple[int, Tensor]:
        return TEXT, torch.randint(FIRST_WORD, NUM_WORDS, (draw(2, 9),), generator=g)

    parts = [words()]
    media: dict[int, list[Media]] = {IMAGE: [], VIDEO: []}
    for kind in kinds:
        grid = (draw(2, 3) if kind == VIDEO else 1, 2 * draw(1, 2), 2 * draw(1, 2))
        patches_PF = torch.randn(prod(grid), cfg.vision.patch_values, generator=g)
        media[kind].append(Media(inputs_UF=patches_PF, grid=grid))
        parts += [(kind, torch.full((prod(grid) // 4,), IMAGE_ID if kind == IMAGE else VIDEO_ID)), words()]
    tokens_T = torch.cat([tokens for _, tokens in parts])
    kinds_T = torch.cat([torch.full_like(tokens, kind) for kind, tokens in parts])
    is_label_T = (kinds_T == TEXT) & (torch.rand(tokens_T.shape, generator=g) < 0.5) & supervised
    return Sample(
        tokens_T=tokens_T,
        labels_T=torch.where(is_label_T, tokens_T, IGNORE),
        kinds_T=kinds_T,
        images=tuple(media[IMAGE]),
        videos=tuple(media[VIDEO]),
        id=str(seed),
        number=seed,
    )


BATCHES: dict[str, Callable[[int], tuple[Sequence[int], bool]]] = {
    # sample i of NUM_SAMPLES -> its media and whether it is supervised
    "mixed": lambda i: (((), (IMAGE,), (VIDEO, IMAGE), (IMAGE, IMAGE))[i % 4], True),
    "text": lambda i: ((), True),
    "video": lambda i: ((VIDEO,), True),
    "first half without images": lambda i: ((IMAGE,) * (2 * i // NUM_SAMPLES), True),
    "first half unsupervised": lambda i: ((IMAGE,) * (i % 2), 2 * i >= NUM_SAMPLES),
    "unsupervised": lambda i: ((IMAGE,) * (i % 2), False),  # of a model with experts the balancing loss is left
}


def batch_of(cell: Cell, index: int = 0, size: int = 1) -> Batch:
    """What batch rank `index` of `size` gets before `Program.split`: its samples, packed, in float64."""
    model = model_of(cell.family, cell.num_layers)
    cfg = model.cfg
    mine = range(NUM_SAMPLES * index // size, NUM_SAMPLES * (index + 1) // size)
    media = [BATCHES[cell.batch](i) for i in mine]
    rows = [_sample(cfg, i, kinds, supervised=ok) for i, (kinds, ok) in zip(mine, media, strict=True)]
    used = packed(model, rows, **cell.pack).tokens_T.numel()
    num_segments = -(-NUM_SAMPLES // size)  # the same on every rank
    sizes = {"tokens": -(-used // PAD_TOKENS) * PAD_TOKENS, "segments": num_segments}
    return wide(packed(model, rows, **(sizes | dict(cell.pack))))


def prepared(cell: Cell, mesh: Mesh, *, donate: bool = True) -> tuple[Step, State, Batch]:
    """The step, its first state and this rank's share of the batch."""
    model = model_of(cell.family, cell.num_layers)
    specs = TRAINED[cell.trained](model.family.specs(model.cfg))
    program = pipe(Program.of(specs, mesh=mesh), *cell.transforms)
    params = _with_adapters(model.params, specs)
    if mesh.layout.world > 1:
        params = shard_params(params, program.specs, mesh)
    # With beta1 = 0 the first moment is the clipped gradient. A large eps keeps the update smooth where it is tiny.
    writer = adamw(betas=(0.0, 0.9), eps=1e-3, weight_decay=0.1)
    writer = on_host(writer, 500, what=("parameters",)) if program.weights.is_hosted else writer
    optimizer = chain(clip_by_global_norm(0.5), writer)
    rate = schedule("constant", peak=1e-2, num_steps=1)
    step = make_step(model.family, model.cfg, program, "per_token_loss", optimizer, schedule=rate, donate=donate)
    own = program.split(batch_of(cell, mesh["batch"].index, mesh["batch"].size))
    return step, init_state(params, optimizer, specs), own


def _with_adapters(params: Tree, specs: Tree) -> Tree:
    """Copies of the parameters, and adapters that matter: none of their leaves is zero."""

    def draw(path: str, leaf: Tensor) -> Tensor:
        if "/lora/" not in path:
            return leaf.clone()
        return torch.randn(leaf.shape, generator=rng.generator(2, path), dtype=leaf.dtype) * leaf.shape[-1] ** -0.5

    return tree.map_with_path(draw, add_adapters(params, specs, 0))


def outcome(cell: Cell, mesh: Mesh) -> dict[str, Tensor]:
    """One step as this rank of the mesh sees it: metrics, whole clipped gradients and whole updated parameters."""
    step, state, batch = prepared(cell, mesh)
    state, metrics = step(state, [batch])
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
        assert bool(norm > 1e-3) == (cell.family == "moe"), "the balancing loss is all there is"
    else:
        assert norm > 0.5, "clipping is part of the step"
    for name, want in expected.items():
        error = (found[name].double() - want).abs().max() if want.numel() else torch.zeros(())
        assert error <= RTOL[cell.dtype] * want.abs().max(), f"{cell}: {name} is off by {error:.1e}"


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
