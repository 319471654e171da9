"""What a combination of the campaign is made of, drawn by seed: layout, transforms, optimizer and samples."""

import random
from dataclasses import dataclass, fields

import torch

from mmfn.batch import Sample
from mmfn.parallel.context.token_order import CP_KINDS, PIECE_KINDS
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.program import Transform
from mmfn.parallel.transforms.data_parallel import data_parallel
from mmfn.parallel.transforms.expert_parallel import expert_parallel
from mmfn.parallel.transforms.offload import offload
from mmfn.parallel.transforms.precision import precision
from mmfn.parallel.transforms.remat import remat
from mmfn.parallel.transforms.vocabulary_parallel import vocabulary_parallel
from mmfn.train import optim
from mmfn.train.objective import OBJECTIVES
from mmfn.train.optim.muon import muon, with_others
from mmfn.tree import Tree
from tests import tiny
from tests.parallel.conformance import spread

MOST = 3  # samples of a micro-batch
KINDS = {"": Layout(), "gather": Layout(cp=2), "ulysses": Layout(cp=2, ulysses=2), "ring": Layout(cp=2)}
WIDE = {**KINDS, "gather": Layout(cp=3), "ring": Layout(cp=3), "ulysses": Layout(cp=4, ulysses=4)}
WIDE["usp"] = Layout(cp=4, ulysses=2)


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
    is_released: bool

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {value}" for f in fields(self) if (value := getattr(self, f.name)) not in ("", ()))


def draw(seed: int) -> Draw:
    """A combination that nothing refuses."""
    r = random.Random(f"campaign {seed}")
    family = r.choice([name for name in tiny.TINY if name != "small"])
    model, has_experts = tiny.model_of(family), tiny.has_experts(family)
    kind = r.choice(("", "", *(PIECE_KINDS if model.family.is_recurrent(model.cfg) else CP_KINDS)))
    along = (WIDE if r.random() < 0.3 or kind == "usp" else KINDS)[kind]
    sizes = [(i, j) for i in (1, 1, 2) for j in (1, 2, 3, 4) if i * j * along.cp <= 6]
    replicate, dp = r.choice(sizes)
    ranks = dp * along.cp
    ep = r.choice([n for n in (1, 2, 4) if ranks % n == 0]) if has_experts else 1
    dtypes = [torch.float64] * 4 + [torch.float32] + [torch.bfloat16] * (3 if family == "dense" else 0)
    ties = r.choice(("", "", "zero", "repeated")) if has_experts else ""
    dtype = r.choice(dtypes) if ties != "repeated" else torch.float64
    if family == "toy" and dtype == torch.float32:
        dtype = (
            torch.float64
        )  # its towers have no norms: a rounding of 1e-7 is 1e-5 of the first gradient, 1e-3 of the next
    moved = r.choice(((), (), (), ("activations",), ("parameters",), ("activations", "parameters")))
    writers = ("adamw", "sgd", "rules", "ema") if "parameters" in moved else ("adamw", "sgd", "muon", "rules", "ema")
    kinds = ["none", "full", "every 2", "uniform", "block", "attention", "matmul", "towers"]
    kinds += ["experts"] * has_experts + ["exchange"] * (4 if ep > 1 else 0)
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
        is_released=random.Random(f"released {seed}").random() < 0.3,
    )


def transforms_of(case: Draw) -> list[Transform]:
    """In any order."""
    r, model = random.Random(case.seed), tiny.model_of(case.family, case.num_layers)
    is_kept = case.gathered == "kept"
    reshard = case.is_released and not is_kept
    found = [data_parallel(prefetch=case.gathered != "late", keep_gathered=is_kept, reshard_after_forward=reshard)]
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
