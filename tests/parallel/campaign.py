"""Random combinations of all that a step is made of, each against a step written out from formulas."""

from collections.abc import Sequence

import torch

from mmfn import tree
from mmfn.batch import Sample
from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.mesh.layout import Mesh, single_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.program import Program, Transform, pipe
from mmfn.parallel.transforms.precision import precision
from mmfn.parallel.weights.sharding import shard_params, whole
from mmfn.train.objective import OBJECTIVES, Objective
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step
from mmfn.tree import Tree
from tests import tiny
from tests.batches import packed, wide
from tests.parallel import written_out
from tests.parallel.campaign_draws import MOST, Draw, deal_of, optimizer_of, transforms_of
from tests.parallel.conformance import PAD_TOKENS
from tests.parallel.written_out import Outcome

LR = 1e-2
RTOL = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 8e-2}


def params_of(case: Draw, specs: Tree) -> Tree:
    """Those of the tiny model, with routers that cannot tell experts apart where there are ties."""

    def tie(path: str, leaf: torch.Tensor) -> torch.Tensor:
        if not case.ties or "/router/" not in path:
            return leaf
        return torch.zeros_like(leaf) if case.ties == "zero" else leaf[::2].repeat_interleave(2, 0)

    params = tiny.with_adapters(tiny.model_of(case.family, case.num_layers).params, specs)
    return tree.map_with_path(tie, params)


def take_steps(case: Draw, mesh: Mesh, transforms: Sequence[Transform], batches: Sequence[Sequence[Sample]]) -> Outcome:
    """Two steps as a rank sees them."""
    model = tiny.model_of(case.family, case.num_layers)
    specs = tiny.TRAINED[case.trained](model.family, model.cfg)
    program = pipe(Program.of(specs, mesh=mesh), *transforms)
    params = (
        shard_params(params_of(case, specs), program.specs, mesh) if mesh.layout.world > 1 else params_of(case, specs)
    )
    writer = optimizer_of(case, program.specs, is_moved=program.weights.is_hosted)
    rate = schedule("constant", peak=LR, num_steps=1)
    step = make_step(model.family, model.cfg, program, objective_of(case), writer, schedule=rate)
    state = init_state(params, writer, program.specs)
    multiple = segment_multiple(case.kind, case.layout) if case.layout.cp > 1 else 1
    sizes = {"segments": max(map(len, batches)), "segment_multiple": multiple}
    if mesh.layout.world > 1:
        sizes |= {"tokens": tokens_of(case, multiple), "segments": MOST}
    shares = [program.split(wide(packed(model, rows, **sizes))) for rows in batches]
    found = Outcome([], [], {})
    for _ in range(2):
        state, metrics = step(state, shares)
        found.losses.append(float(metrics["loss"]))
        found.norms.append(float(metrics["grad_norm"]))
    found.params.update({path: whole(leaf, mesh) for path, leaf in tree.items(state["params"])})
    return found


def tokens_of(case: Draw, multiple: int) -> int:
    """Of every micro-batch, those of one rank."""
    model = tiny.model_of(case.family, case.num_layers)
    used = [packed(model, rows, segment_multiple=multiple).tokens_T.numel() for rank in deal_of(case) for rows in rank]
    return -(-max(used) // PAD_TOKENS) * PAD_TOKENS


def objective_of(case: Draw) -> Objective:
    """With what a token's loss has besides."""
    return Objective(weighting=OBJECTIVES[case.objective], z_loss=case.z_loss, label_smoothing=case.smoothing)


def expected(case: Draw) -> Outcome:
    """Two steps written out; in bfloat16, whose rounding no formula has, those of one device in bfloat16."""
    model, deal = tiny.model_of(case.family, case.num_layers), deal_of(case)
    specs = tiny.TRAINED[case.trained](model.family, model.cfg)
    if case.dtype != torch.bfloat16:
        writer = optimizer_of(case, specs, is_moved=False)
        params, objective = params_of(case, specs), objective_of(case)
        return written_out.steps(model, specs, params, deal, case.objective, objective, writer, LR)
    batches = [rows for rank in deal for rows in rank]
    if case.objective != "default":  # which is the only one that is the same for micro-batches of one step
        batches = [[row for rank in deal for row in rank[a]] for a in range(case.micro_batches)]
    return take_steps(case, single_mesh(), [precision(compute=case.dtype)], batches)


def check(case: Draw) -> None:
    """Assert that every rank has the loss, the gradient norm and the parameters of the step written out."""
    deal, rtol, one = deal_of(case), RTOL[case.dtype], expected(case)
    ranks = virtual(case.layout, lambda mesh: take_steps(case, mesh, transforms_of(case), deal[mesh["batch"].index]))
    for rank, found in enumerate(ranks):
        for name in ("losses", "norms"):
            got, want = torch.tensor(getattr(found, name)), torch.tensor(getattr(one, name))
            assert (got - want).abs().max() <= rtol * want.abs().max(), f"{case}: {name} {got} for {want}, rank {rank}"
        assert found.params.keys() == one.params.keys()
        for path, want in one.params.items():
            error = (found.params[path].double() - want).abs().max()
            assert error <= rtol * tiny.scale_of(want, case.dtype), (
                f"{case}: {path} is off by {error:.1e} on rank {rank}"
            )
