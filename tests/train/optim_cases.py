"""One list of optimizers, each with an oracle that shares no code with it: torch.optim, or a written formula.

The leaves are of all kinds an optimizer treats differently: matrices (wide, tall, fused, of experts, with rows that no
number of ranks divides), a table, a vector and a number. Everything is float64.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfn import tree
from mmfn.parallel.mesh.layout import Mesh, single_mesh
from mmfn.parallel.mesh.step_sums import norm_and_sums
from mmfn.parallel.weights.sharding import like, local, placed, shard_params, whole
from mmfn.spec import normal, spec
from mmfn.train import optim
from mmfn.train.optim import Leaves, Transform, Update
from mmfn.tree import Tree

DECAY, CLIP = 0.1, 4.0
DRAW = normal(1.0)
SPECS = {
    "embed/weight": spec((11, 6), "vocab embed", DRAW),
    "experts/gate_up": spec((4, 10, 3), "experts mlp embed", DRAW, parts=2),
    "layers/0/wide/weight": spec((5, 7), "mlp embed", DRAW),
    "layers/1/wide/weight": spec((5, 7), "mlp embed", DRAW),
    "layers/2/wide/weight": spec((5, 7), "mlp embed", DRAW),
    "layers/0/qkv/weight": spec((12, 6), "q_heads embed", DRAW, parts=3),
    "layers/0/qkv/bias": spec((12,), "q_heads", DRAW),
    "tall/weight": spec((9, 2), "embed mlp", DRAW),
    "norm/weight": spec((6,), "embed", DRAW),
    "gate/weight": spec((1, 6), "router embed", DRAW),
}
MATRICES = [path for path in SPECS if path.startswith(("experts", "layers", "tall")) and not path.endswith("bias")]
NO_DECAY = [path for path, leaf in SPECS.items() if len(leaf.shape) == 1]
SLOW = ["tall/weight", "norm/weight"]  # half the learning rate


def draw(seed: int, dtype: torch.dtype = torch.float64) -> Leaves:
    """A value for every leaf."""
    g = torch.Generator().manual_seed(seed)
    return {p: torch.randn(s.shape, generator=g, dtype=torch.float64).to(dtype) for p, s in SPECS.items()}


def rate(step: int) -> float:
    """The learning rate, another one in every step."""
    return 1e-2 / (1 + step % 7)


Oracle = Callable[[Leaves, int], Leaves]  # (parameters, steps) -> parameters, or what else is compared


@dataclass(frozen=True, kw_only=True)
class Case:
    """A line of the matrix. `read`: what is compared, from parameters and optimizer state."""

    name: str
    make: Callable[[], Transform]
    oracle: Oracle
    read: Callable[[Leaves, Tree], Leaves] = lambda params, opt: params

    def __str__(self) -> str:
        return self.name


def composed(transform: Transform) -> Transform:
    """What all cases have in common: clipping, decay masks and a slower group."""
    slow = [("|".join(SLOW), 0.5)]
    ruled = optim.by_path(transform, no_decay=NO_DECAY, lr_scales=slow)
    return optim.chain(optim.clip_by_global_norm(CLIP), ruled)


def train(
    tx: Transform,
    steps: Sequence[int],
    mesh: Mesh | None = None,
    kernel: str = "fused",
    dtype: torch.dtype = torch.float64,
    poisoned: int | None = None,
    jit: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda update: update,
) -> tuple[Leaves, Tree, list[Tensor]]:
    """Parameters, optimizer state (both whole) and norms after updates by gradients drawn for `steps`.

    In step `poisoned` one value of the gradient of the first rank is no number. `jit`: what makes a graph of an update.
    """
    mesh = mesh or single_mesh()
    update = tx.update(optim.facts_of(SPECS, mesh))

    @jit
    def apply(params: Leaves, grads: Leaves, opt: Tree, lr: Tensor, step: Tensor) -> tuple[Tree, Tensor]:
        norm, _ = norm_and_sums(optim.global_norm(grads), {}, mesh)
        finite = torch.isfinite(norm)
        u = Update(params=params, grads=grads, norm=norm, finite=finite, lr=lr, step=step, kernel=kernel)
        return update(u, opt)[1], norm

    params = shard_params(draw(0, dtype), SPECS, mesh)
    own = {p: local(x) for p, x in params.items()}
    opt, norms = tx.init(own), []
    for i in steps:
        grads = {p: local(x).clone() for p, x in shard_params(draw(i + 1, dtype), SPECS, mesh).items()}
        if i == poisoned and mesh["world"].index == 0:
            grads["layers/0/wide/weight"][0, 0] = torch.nan
        opt, norm = apply(own, grads, opt, torch.tensor(rate(i), dtype=torch.float64), torch.tensor(i))
        norms.append(norm)
    joined = {p: whole(like(own[p], params[p]), mesh) for p in params}
    return joined, tree.map(lambda leaf: whole(leaf, mesh), placed(opt, params)), norms


# ---- oracles


def gradients(params: Leaves, step: int) -> None:
    """Give every parameter its clipped gradient."""
    for path, grad in draw(step + 1).items():
        params[path].grad = grad
    torch.nn.utils.clip_grad_norm_(params.values(), CLIP)


def groups(params: Leaves, paths: Sequence[str], decay: float) -> list[dict[str, object]]:
    """Groups of torch.optim, a leaf each."""
    return [{"params": [params[p]], "weight_decay": 0.0 if p in NO_DECAY else decay} for p in paths]


def set_rates(optimizer: torch.optim.Optimizer, paths: Sequence[str], step: int) -> None:
    """The learning rate of a step."""
    for path, group in zip(paths, optimizer.param_groups, strict=True):
        group["lr"] = rate(step) * (0.5 if path in SLOW else 1.0)


def torch_adamw(params: Leaves, num_steps: int) -> Leaves:
    optimizer = torch.optim.AdamW(groups(params, list(params), DECAY), betas=(0.8, 0.95), eps=1e-6, foreach=False)
    for i in range(num_steps):
        gradients(params, i)
        set_rates(optimizer, list(params), i)
        optimizer.step()
    return params


def torch_sgd(momentum: float, nesterov: bool, each: Callable[[Leaves], None] = lambda params: None) -> Oracle:
    """torch.optim.SGD without its coupled decay; the decoupled one is a factor before the step."""

    def run(params: Leaves, num_steps: int) -> Leaves:
        optimizer = torch.optim.SGD(groups(params, list(params), 0.0), momentum=momentum, nesterov=nesterov)
        for i in range(num_steps):
            gradients(params, i)
            set_rates(optimizer, list(params), i)
            with torch.no_grad():
                for path, group in zip(params, optimizer.param_groups, strict=True):
                    params[path] *= 1 - group["lr"] * (0.0 if path in NO_DECAY else DECAY)
            optimizer.step()
            each(params)
        return params

    return run


@contextmanager
def iterations_in_float64() -> Iterator[None]:
    """torch.optim.Muon rounds to bfloat16 by a method of tensors: without it, it is an oracle to the last digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "bfloat16", lambda x: x.clone())
        yield


def torch_muon(nesterov: bool, adjust_lr: str) -> Oracle:
    """torch.optim.Muon on every single matrix and AdamW on the rest."""

    def run(params: Leaves, num_steps: int) -> Leaves:
        singles: list[tuple[str, Callable[[Tensor], Tensor]]] = []
        for path in MATRICES:
            rows = SPECS[path].shape[-2] // SPECS[path].parts
            for part in range(SPECS[path].parts):
                cut = slice(part * rows, (part + 1) * rows)
                if len(SPECS[path].shape) == 2:
                    singles.append((path, lambda x, cut=cut: x[cut]))
                else:
                    singles += [(path, lambda x, e=e, cut=cut: x[e, cut]) for e in range(SPECS[path].shape[0])]
        views = [torch.nn.Parameter(view(params[path].detach())) for path, view in singles]  # of the same memory
        others = [path for path in params if path not in MATRICES]
        muon = torch.optim.Muon(
            [{"params": [x]} for x in views],
            weight_decay=DECAY,
            momentum=0.9,
            nesterov=nesterov,
            adjust_lr_fn=adjust_lr,
        )
        adamw = torch.optim.AdamW(groups(params, others, DECAY), betas=(0.8, 0.95), eps=1e-6, foreach=False)
        for i in range(num_steps):
            gradients(params, i)
            for x, (path, view) in zip(views, singles, strict=True):
                x.grad = view(params[path].grad).clone()
            set_rates(muon, [path for path, _ in singles], i)
            set_rates(adamw, others, i)
            with iterations_in_float64():
                muon.step()
            adamw.step()
        return params

    return run


def averaged_sgd(params: Leaves, num_steps: int) -> Leaves:
    """The average of plain descent, written as the sum it is."""
    decay, seen = 0.9, [{p: x.detach().clone() for p, x in params.items()}]
    torch_sgd(0.0, False, lambda now: seen.append({p: x.detach().clone() for p, x in now.items()}))(params, num_steps)
    weights = [decay**num_steps, *((1 - decay) * decay ** (num_steps - 1 - i) for i in range(num_steps))]
    return {p: sum(w * values[p] for w, values in zip(weights, seen, strict=True)) for p in params}


def muon(nesterov: bool = True, adjust_lr: str = "original") -> Transform:
    """Muon with AdamW for what is no matrix."""
    kind = optim.muon(momentum=0.9, nesterov=nesterov, weight_decay=DECAY, adjust_lr=adjust_lr, compute=torch.float64)
    return composed(optim.with_others(kind, adamw(), SPECS))


def adamw(**options: object) -> Transform:
    return optim.adamw(betas=(0.8, 0.95), eps=1e-6, weight_decay=DECAY, **options)


def sgd(momentum: float = 0.0, nesterov: bool = False) -> Transform:
    return optim.sgd(momentum=momentum, nesterov=nesterov, weight_decay=DECAY)


CASES = [
    Case(name="adamw", make=lambda: composed(adamw()), oracle=torch_adamw),
    Case(name="sgd", make=lambda: composed(sgd()), oracle=torch_sgd(0.0, False)),
    Case(name="sgd with momentum", make=lambda: composed(sgd(0.9)), oracle=torch_sgd(0.9, False)),
    Case(name="sgd with nesterov", make=lambda: composed(sgd(0.9, True)), oracle=torch_sgd(0.9, True)),
    Case(name="muon", make=muon, oracle=torch_muon(True, "original")),
    Case(
        name="muon like adamw", make=lambda: muon(False, "match_rms_adamw"), oracle=torch_muon(False, "match_rms_adamw")
    ),
    Case(name="master", make=lambda: composed(optim.master(adamw())), oracle=torch_adamw),
    Case(
        name="ema",
        make=lambda: composed(optim.chain(sgd(), optim.ema(0.9))),
        oracle=averaged_sgd,
        read=lambda params, opt: opt[1][1]["ema"],
    ),
]
