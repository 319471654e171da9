"""Random combinations of all that a step is made of, by seed, each against a step written out from formulas."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from mmfn import tree
from mmfn.batch import Sample
from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.mesh.layout import Layout, Mesh, single_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.program import Program, Transform, pipe
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.transforms.precision import precision
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.transforms.vocabulary_parallel import vocabulary_parallel
from mmfn.parallel.weights.sharding import shard_params, whole
from mmfn.train import optim
from mmfn.train.objective import OBJECTIVES, Objective
from mmfn.train.optim.muon import muon, with_others
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step
from mmfn.tree import Tree
from tests import tiny
from tests.batches import packed, wide
from tests.parallel import written_out
from tests.parallel.conformance import PAD_TOKENS, spread
from tests.parallel.written_out import Outcome

LR = 1e-2
MOST = 3  # samples of a micro-batch
KINDS = {"": Layout(), "gather": Layout(cp=2), "ulysses": Layout(cp=2, ulysses=2), "ring": Layout(cp=2)}
WIDE = {**KINDS, "gather": Layout(cp=3), "ring": Layout(cp=3), "ulysses": Layout(cp=4, ulysses=4)}
WIDE["usp"] = Layout(cp=4, ulysses=2)
RTOL = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 8e-2}


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One combination; `str` of it is what a report needs."""

    seed: int
    family: str
    num_layers: int
    layout: Layout
    kind: str
    remat: str
    offload: tuple[str, ...]
    head: str
    gathered: str
    capacity: bool
    ties: str
    trained: str
    objective: str
    z_loss: float
    smoothing: float
    optimizer: str
    dtype: torch.dtype
    micro_batches: int

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {value}" for f in fields(self) if (value := getattr(self, f.name)) not in ("", ()))


def draw(seed: int) -> Draw:
    """A combination that nothing refuses."""
    r = random.Random(f"campaign {seed}")
    family = r.choice(("dense", "moe", "toy"))
    kind = r.choice(("", "", "gather", "ulysses", "ring", "usp"))
    along = (WIDE if r.random() < 0.3 or kind == "usp" else KINDS)[kind]
    sizes = [(i, j) for i in (1, 1, 2) for j in (1, 2, 3, 4) if i * j * along.cp <= 6]
    replicate, dp = r.choice(sizes)
    ranks = dp * along.cp
    ep = r.choice([n for n in (1, 2, 4) if ranks % n == 0]) if family != "dense" else 1
    dtypes = [torch.float64] * 4 + [torch.float32] + [torch.bfloat16] * (family == "dense")
    ties = r.choice(("", "", "zero", "repeated")) if family != "dense" else ""
    dtype = r.choice(dtypes) if ties != "repeated" else torch.float64
    if family == "toy" and dtype == torch.float32:
        dtype = (
            torch.float64
        )  # its towers have no norms: a rounding of 1e-7 is 1e-5 of the first gradient, 1e-3 of the next
    moved = r.choice(((), (), (), ("activations",), ("parameters",), ("activations", "parameters")))
    writers = ("adamw", "sgd", "rules", "ema") if "parameters" in moved else ("adamw", "sgd", "muon", "rules", "ema")
    kinds = ["none", "full", "every 2", "uniform", "block", "attention", "matmul", "towers"]
    kinds += ["experts"] * (family != "dense") + ["exchange"] * (2 if ep > 1 else 0)
    trained = r.choice(("all", "all", "all", *(name for name in tiny.TRAINED if name != "all")))
    optimizer = r.choice(writers)
    return Draw(
        seed=seed,
        family=family,
        num_layers=r.choice((2, 2, 3)),
        layout=Layout(replicate=replicate, dp=dp, cp=along.cp, ulysses=along.ulysses, ep=ep),
        kind=kind,
        remat=r.choice(kinds),
        offload=moved,
        head=r.choice(("", "sharded")) if ranks > 1 else "",
        gathered=r.choice(("", "", "kept", "late")),
        capacity=ep > 1 and r.random() < 0.4,
        ties=ties,
        trained=trained,
        objective=r.choice(list(OBJECTIVES)),
        z_loss=r.choice((0.0, 0.0, 1e-2)),
        smoothing=r.choice((0.0, 0.0, 0.1)),
        optimizer="adamw" if optimizer == "rules" and trained != "all" else optimizer,
        dtype=dtype,
        micro_batches=r.choice((1, 2, 3)),
    )


def transforms_of(case: Draw) -> list[Transform]:
    """In any order."""
    r, model = random.Random(case.seed), tiny.model_of(case.family, case.num_layers)
    found = [data_parallel(prefetch=case.gathered != "late", keep_gathered=case.gathered == "kept")]
    if case.kind:
        found.append(spread(case.kind, case.family))
    if case.layout.ep > 1:
        most = float(case.layout.ep) if case.capacity else None  # as many as there are
        found.append(expert_parallel("capacity" if case.capacity else "dropless", capacity=most))
    *towers, text = model.family.stacks(model.cfg)
    found += {
        "none": [],
        "full": [remat("full")],
        "every 2": [remat("full", every=2)],
        "uniform": [remat("uniform", num_layers=2)],
        "block": [remat("block", num_layers=1)],
        "towers": [*(remat("full", where=name) for name in towers), remat("selective", save=("matmul",), where=text)],
        "exchange": [remat("selective", save=("exchange", "attention"), where=text)],
    }.get(case.remat) or ([] if case.remat == "none" else [remat("selective", save=(case.remat,))])
    found += [offload(what) for what in case.offload]
    found += [vocabulary_parallel()] * (case.head == "sharded")
    found += [precision(compute=case.dtype)] * (case.dtype != torch.float64)
    r.shuffle(found)
    return found


def optimizer_of(case: Draw, specs: Tree, *, is_moved: bool) -> optim.Transform:
    """Clipping, and what writes; large `eps` keep the update smooth where the gradient is tiny."""
    adamw = optim.adamw(eps=1e-3, weight_decay=0.1)
    if case.optimizer == "sgd":
        adamw = optim.sgd(momentum=0.9, nesterov=True, weight_decay=0.1)
    if case.optimizer == "muon":
        adamw = with_others(muon(compute=torch.float64), adamw, specs)
    if case.optimizer == "rules":
        adamw = optim.by_path(adamw, no_decay=[r".*norm/weight"], lr_scales=[(r"text/layers/.*", 0.5)])
    writer = optim.on_host(adamw, 500, what=("parameters",)) if is_moved and "parameters" in case.offload else adamw
    return optim.chain(optim.clip_by_global_norm(0.5), writer, *([optim.ema(0.9)] if case.optimizer == "ema" else []))


def deal_of(case: Draw) -> list[list[list[Sample]]]:
    """Up to `MOST` samples a micro-batch, none on some ranks, some of them without a label."""
    r, model = random.Random(f"deal {case.seed}"), tiny.model_of(case.family, case.num_layers)
    known = tiny.media_kinds(model.family, model.cfg)
    ranks, number = case.layout.replicate * case.layout.dp, iter(range(10_000))

    def one() -> Sample:
        media = r.choices(known, k=r.choice((0, 0, 1, 1, 2)))
        return tiny.sample(model.family, model.cfg, next(number), media, is_supervised=r.random() < 0.8)

    return [[[one() for _ in range(r.randint(d == 0, MOST))] for _ in range(case.micro_batches)] for d in range(ranks)]


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
            assert error <= rtol * want.abs().max(), f"{case}: {path} is off by {error:.1e} on rank {rank}"
