"""A training step written out from formulas: samples on one device, logits, sums per sample, autograd, one update.

It shares with mmfn the forward pass with the reference ops, and the formulas of optimizers, which have oracles of their
own. Legend: D ranks with their own data, A micro-batches of each, N samples of a micro-batch, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mmfn
from mmfn import lora, models, ops, spec, tree
from mmfn.batch import IGNORE, Sample
from mmfn.parallel.mesh.layout import single_mesh
from mmfn.train import optim
from mmfn.train.objective import Objective
from mmfn.train.optim import Update
from mmfn.tree import Tree
from tests.batches import packed, wide

Deal = Sequence[Sequence[Sequence[Sample]]]
"""samples[d][a]: those of micro-batch a of rank d."""


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean() if values else torch.zeros((), dtype=torch.float64)


def _default(sums: Tensor, counts: Tensor) -> Tensor:
    D, A, _ = counts.shape
    places = [(d, a) for d in range(D) for a in range(A) if counts[d, a].sum()]
    return _mean([sums[p].sum() / counts[p].sum() for p in places])


def _per_sample(sums: Tensor, counts: Tensor) -> Tensor:
    return _mean([s / n for s, n in zip(sums.flatten(), counts.flatten(), strict=True) if n])


def _per_token(sums: Tensor, counts: Tensor) -> Tensor:
    return sums.sum() / counts.sum().clamp(min=1)


def _token(sums: Tensor, counts: Tensor) -> Tensor:
    return _mean([sums[:, a].sum() / counts[:, a].sum() for a in range(counts.shape[1]) if counts[:, a].sum()])


def _square(sums: Tensor, counts: Tensor) -> Tensor:
    w = torch.where(counts > 0, counts.clamp(min=1).double() ** -0.5, 0.0)
    return _mean(
        [(w * sums)[:, a].sum() / (w * counts)[:, a].sum() for a in range(counts.shape[1]) if counts[:, a].sum()]
    )


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (sums, counts) of [D, A, N]: losses and labels
    "default": _default,
    "per_sample_loss": _per_sample,
    "per_token_loss": _per_token,
    "token_loss": _token,
    "square_loss": _square,
}


class Outcome(NamedTuple):
    """Of every step loss and gradient norm, and the parameters behind the last."""

    losses: list[float]
    norms: list[float]
    params: dict[str, Tensor]


def steps(
    model: mmfn.Model, specs: Tree, params: Tree, deal: Deal, name: str, objective: Objective, writer: Any, lr: float
) -> Outcome:
    """Two steps with the same samples; `name`: of the objective's weighting."""
    leaves = {path: leaf.clone() for path, leaf in tree.items(params)}
    paths = spec.trained_paths(specs)
    update = writer.update(optim.facts_of(specs, single_mesh()))
    opt = writer.init({path: leaves[path] for path in paths})
    salts, found = lora.salts_of(specs, 0), Outcome([], [], leaves)
    for number in range(2):
        at = torch.tensor(number)
        own = None if salts is None else salts(at, torch.device("cpu"))
        trained = {path: leaves[path].clone().requires_grad_() for path in paths}
        given = tree.map_with_path(lambda path, leaf, t=trained: t.get(path, leaves[path]), params)
        value, counts = _loss(model, given, deal, name, objective, own)
        value = value + 0.0 * sum(leaf.sum() for leaf in trained.values())  # also where nothing is supervised
        grads = dict(zip(paths, torch.autograd.grad(value, list(trained.values())), strict=True))
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        u = Update(
            params={path: leaves[path] for path in paths},
            grads=grads,
            norm=norm,
            finite=torch.tensor(True),
            lr=torch.tensor(lr, dtype=torch.float64),
            step=at,
            kernel="reference",
        )
        opt = update(u, opt)[1]
        for path in spec.rules_of(specs):  # that of the only family with one
            leaves[path] += (0.01 * (counts[path].mean() - counts[path]).sign()).to(leaves[path])
        found.losses.append(value.item())
        found.norms.append(norm.item())
    return found


def _loss(
    model: mmfn.Model,
    params: Tree,
    deal: Deal,
    name: str,
    objective: Objective,
    salts: Mapping[str, Tensor] | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a global step, and what a rule counts in it."""
    D, A, N = len(deal), len(deal[0]), max(len(rows) for rank in deal for rows in rank)
    family, cfg, table = model.family, model.cfg, ops.reference()
    labels_DAN = torch.zeros(D, A, N, dtype=torch.int64)
    sums: dict[float, list[Tensor]] = {}  # by the weight of a head: [D * N] of each micro-step
    others, totals = [], dict.fromkeys((), torch.zeros(()))
    for a in range(A):
        rows = [row for rank in deal for row in rank[a]]
        batch = replace(wide(packed(model, rows)), salts=salts)
        given = lora.with_drops(params, family.row_ids(batch, cfg), salts)
        out = family.apply(given, batch, cfg, table)
        weight_VD = family.head(given, cfg, table)
        weights = family.loss_weights(cfg)
        further = [(weights[models.ahead_loss(i)], hidden()) for i, hidden in enumerate(out.ahead)]
        heads = [(1.0, out.hidden_TD), *further]
        for ahead, (weight, hidden_TD) in enumerate(heads):
            losses = _of_samples(hidden_TD @ weight_VD.T, rows, ahead, objective)
            places = [(d, n) for d in range(D) for n in range(len(deal[d][a]))]
            table_DN = [[torch.zeros((), dtype=torch.float64)] * N for _ in range(D)]
            for (d, n), own, row in zip(places, losses, rows, strict=True):
                table_DN[d][n] = own
                labels_DAN[d, a, n] = (row.labels_T[1:] != IGNORE).sum()
            sums.setdefault(weight, []).append(torch.stack([torch.stack(row) for row in table_DN]))
        others += [family.loss_weights(cfg)[name] * loss() for name, loss in out.losses.items()]
        totals = {path: totals.get(path, 0) + values for path, values in out.counts.items()}
    value = sum(weight * FORMULAS[name](torch.stack(own, 1), labels_DAN) for weight, own in sums.items())
    return value + torch.stack([torch.zeros((), dtype=torch.float64), *others]).sum() / A, totals


def _of_samples(logits_TV: Tensor, rows: Sequence[Sample], ahead: int, objective: Objective) -> list[Tensor]:
    """The sum of each sample's losses of labels that lie `ahead` places behind the next."""
    found, start = [], 0
    for row in rows:
        num = row.tokens_T.numel()
        labels_T = row.labels_T[1 + ahead :]
        own_TV = logits_TV[start : start + labels_T.numel()][labels_T != IGNORE]
        picked_T = own_TV.gather(1, labels_T[labels_T != IGNORE][:, None])[:, 0]
        lse_T, share = own_TV.logsumexp(1), objective.label_smoothing
        losses_T = lse_T - (1 - share) * picked_T - share * own_TV.mean(1) + objective.z_loss * lse_T.square()
        found.append(losses_T.sum())
        start += num
    return found
