"""Compiled steps of every family: how many graphs there are, and that other samples of the same sizes make no more."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfn
from mmfn import tree
from mmfn.batch import Batch
from mmfn.packing import Sizes, num_units
from mmfn.parallel.program import Program, pipe
from mmfn.parallel.transforms.compiled import compiled
from mmfn.spec import stacks
from mmfn.train.optim import adamw, chain, clip_by_global_norm
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step
from tests import tiny
from tests.train.test_every_family import NAMES

SAMPLED = {("dense", "step"), ("delta_moe", "step"), ("moe", "layer"), ("glm", "layer"), ("omni", "layer")}
CELLS = [
    pytest.param(name, kind, marks=() if (name, kind) in SAMPLED else pytest.mark.slow)
    for name in NAMES
    for kind in ("layer", "step")
]
NUM_LAYERS = 6  # so that there are several blocks of each kind
SAMPLES = 4
FURTHER = {"omni": 1}  # beside blocks: the convolutions of sound


@dataclass
class Counter:
    """A backend that counts the graphs it is given; one that torch traces again, to the letter, is one."""

    graphs: set[Any] = field(default_factory=set)

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Tensor]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs.add((gm.code, tuple(x.shape for x in example_inputs if isinstance(x, Tensor))))
        return aot_eager(gm, example_inputs)


def bucket(model: mmfn.Model) -> list[Batch]:
    """Batches of one size: all kinds of media, others, and text alone."""
    kinds = tiny.media_kinds(model.family, model.cfg)
    all_rows = [
        [tiny.sample(model.family, model.cfg, seed + i, media) for i in range(SAMPLES)]
        for seed, media in ((0, kinds), (50, kinds[:1]), (90, ()))
    ]
    towers = model.family.towers(model.cfg)
    units = {name: max(sum(num_units(s, kind) for s in rows) for rows in all_rows) for name, kind in towers.items()}
    most = max(sum(s.tokens_T.numel() for s in rows) for rows in all_rows)
    sizes = Sizes(tokens=most + 3, segments=SAMPLES + 1, units={name: n + 2 for name, n in units.items()})
    return [model.family.pack(rows, model.cfg, sizes) for rows in all_rows]


def num_kinds(model: mmfn.Model) -> int:
    """Kinds of blocks: the structures and shapes there are in each stack. Those ahead are called as the text's are."""
    blocks = stacks(model.family.specs(model.cfg))
    shapes = {
        (name.replace("mtp", "text"), *((path, leaf.shape) for path, leaf in tree.items(block)))
        for name in blocks
        for block in blocks[name]
    }
    return len(shapes)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_there_is_one_graph_for_each_kind_of_block_or_one_in_all(name: str, kind: str) -> None:
    """And one for the update. What a compiled step learns is what one on its own does, to rounding."""
    torch._dynamo.reset()
    model, backend = tiny.model_of(name, NUM_LAYERS), Counter()
    results = []
    for how in (compiled(kind, backend=backend), compiled("none")):
        writer = chain(clip_by_global_norm(1.0), adamw(eps=1e-3))
        program = pipe(Program.of(model.family.specs(model.cfg)), how)
        rate = schedule("constant", peak=1e-2, num_steps=1)
        step = make_step(model.family, model.cfg, program, "per_token_loss", writer, schedule=rate)
        state = init_state(tree.map(torch.clone, model.params), writer, program.specs)
        for i, batch in enumerate(bucket(model)):
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                state, metrics = step(state, [batch])
        results.append((state["params"], metrics))
    expected = 1 if kind == "step" else num_kinds(model) + FURTHER.get(name, 0) + 1
    assert len(backend.graphs) == expected
    for ours, theirs in zip(*(tree.leaves(result) for result in results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
