"""LoRA: low-rank adapters beside frozen weights, as a transform of the spec tree.

The adapter of the weight `P/name` is the node `P/lora/name`, an `Adapter`: where it is there, a layer adds
`scale * b @ a @ x` to what it computes. Everything else about parameters (shards, optimizer state, plans) follows from
the tree. Source: Hu et al. 2021 (arXiv:2106.09685); rank-stabilised: Kalajdzievski 2023 (arXiv:2312.03732).

An adapter with dropout drops from x in training: where a batch has salts (`salts_of`), the objective calls `with_drops`
on all parameters, with the ids of rows that the family declares, and the layers drop. Models know nothing of it.

Legend: r rank, E experts, T rows, A adapters that drop; a weight is [out, in], or [E, out, in] of experts.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor

from mmfn import dropout as masks
from mmfn import rng, tree
from mmfn.dtypes import wide
from mmfn.errors import UserError
from mmfn.spec import ZEROS, ParamSpec, freeze_leaf, has_experts, init_params, model_dtype, spec, uniform
from mmfn.tree import Tree

NOT_LINEAR = {"vocab", "positions", "tower_inputs", "router", "lora"}
"""Axes of matrices without adapters: tables, the head (part of the loss), a convolution, routers, and adapters."""


Salts = Callable[[Tensor, torch.device], dict[str, Tensor]]
"""(0-D int64 step, device) -> `{path of the weight: 0-D int64}`, what a batch's `salts` are in that step."""


@tree.register
@dataclass(frozen=True, kw_only=True)
class Drops:
    """What an adapter's dropout mask is a function of: `ids_T`, int64[T], which rows of x there are, and a 0-D salt."""

    ids_T: Tensor
    salt: Tensor


@tree.register
@dataclass(frozen=True, kw_only=True)
class Adapter:
    """`a`: [r, in] and `b`: [out, r], of experts [E, r, in] and [E, out, r]: tensors, or specs in a spec tree.

    `dropout`: the share of x that is zeroed where there are `drops`. These are no parameters: `with_drops` adds them to
    what a model is about to compute with.
    """

    a: Any
    b: Any
    alpha: float = field(metadata={"static": True})
    is_rs: bool = field(metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})
    drops: Drops | None = None

    @property
    def rank(self) -> int:
        """r."""
        rank: int = self.a.shape[-2]
        return rank

    @property
    def scale(self) -> float:
        """`alpha / r`, rank-stabilised `alpha / sqrt(r)`."""
        return self.alpha / (sqrt(self.rank) if self.is_rs else self.rank)


def lora(
    specs: Tree,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    is_rs: bool = False,
    dropout: float = 0.0,
    keep: Sequence[str] = (),
) -> Tree:
    """The specs with an adapter beside every targeted weight, and everything else frozen.

    `targets`: regexes over linear layers (`.../layers/0/attention/q`) and stacks of experts
    (`.../layers/0/moe/experts/gate_up`). `keep`: regexes over paths of parameters that are trained as well. `a` is
    drawn as `torch.nn.Linear` draws its weight and `b` is zero: at first the model computes what it did. Ranks that are
    multiples of 8 let experts use the grouped kernel of a GPU (see `mmfn.ops.experts`). `dropout`: the share of an
    adapter's inputs that a training step zeroes, the others divided by what is left (`mmfn.dropout`).

    Raises ValueError for a pattern that matches nothing, a rank or alpha that is not positive, a dropout outside
    [0, 1), and one with targets that are stacks of experts.
    """
    if rank < 1 or not 0 < alpha < inf:
        raise UserError(
            f"LoRA needs a rank of at least 1 and a positive alpha that is finite, got rank {rank} and alpha {alpha}"
        )
    if not 0 <= dropout < 1:
        raise UserError(f"LoRA dropout is {dropout} but must be at least 0 and below 1; change it")
    found = layers(specs)
    chosen = tree.mask(dict.fromkeys(found, 0), [(pattern, True) for pattern in targets], default=False)
    weights = [found[layer] for layer, is_chosen in chosen.items() if is_chosen]
    if not weights:
        raise UserError(r"LoRA got no targets; name layers, such as .*/layers/\d+/attention/(q|v)")
    kept = tree.mask(specs, [(pattern, True) for pattern in keep], default=False)
    trained = [path for path, is_kept in tree.items(kept) if is_kept]
    if clash := set(trained) & set(weights):
        raise UserError(f"parameter {min(clash)!r} is kept trainable and has an adapter; choose one of the two")
    return adapt(specs, weights, trained, rank=rank, alpha=alpha, is_rs=is_rs, dropout=dropout)


def adapt(
    specs: Tree,
    weights: Collection[str],
    kept: Collection[str],
    *,
    rank: int,
    alpha: float,
    is_rs: bool = False,
    dropout: float = 0.0,
) -> Tree:
    """`lora` for paths: adapters beside `weights`, and every leaf frozen but `kept`, from rules too."""
    leaves = dict(tree.items(specs))
    if stacks := [path for path in weights if dropout and len(leaves[path].shape) == 3]:
        raise UserError(
            f"LoRA dropout is {dropout} but {min(stacks)!r} is a stack of experts, whose adapters have none (nor have "
            "peft's); leave experts out of the targets, or set it to 0"
        )
    made = {path: adapter_specs(leaves[path], rank, alpha, is_rs=is_rs, dropout=dropout) for path in weights}
    frozen = tree.map_with_path(lambda path, leaf: leaf if path in kept else freeze_leaf(leaf), specs)
    return insert(frozen, made)


def layers(specs: Tree) -> dict[str, str]:
    """What can have an adapter: `{layer: path of its weight}`. A stack of experts is its own weight."""
    found = {}
    for path, leaf in tree.items(specs):
        layer, _, name = path.rpartition("/")
        if NOT_LINEAR & set(leaf.axes):
            continue
        if has_experts(leaf) and len(leaf.shape) == 3:
            found[path] = path
        elif name == "weight" and len(leaf.shape) == 2:
            found[layer] = path
    return found


def adapter_specs(weight: ParamSpec, rank: int, alpha: float, *, is_rs: bool, dropout: float) -> Adapter:
    """The adapter of a weight [..., out, in]."""
    *stack, d_out, d_in = weight.shape
    *names, out, into = weight.axes
    return Adapter(
        a=spec((*stack, rank, d_in), " ".join((*names, "lora", into)), uniform(d_in**-0.5)),
        b=spec((*stack, d_out, rank), " ".join((*names, out, "lora")), ZEROS, weight.parts),
        alpha=float(alpha),
        is_rs=is_rs,
        dropout=float(dropout),
    )


def insert(node: Tree, adapters: Mapping[str, Adapter], prefix: str = "") -> Tree:
    """The tree with each adapter beside its weight. `adapters`: by path of the weight."""
    if isinstance(node, list):
        return [insert(child, adapters, f"{prefix}{i}/") for i, child in enumerate(node)]
    if not isinstance(node, dict):
        return node
    inner = {name: insert(child, adapters, f"{prefix}{name}/") for name, child in node.items()}
    own = {name: adapters[prefix + name] for name in node if prefix + name in adapters}
    return {**inner, "lora": {**node.get("lora", {}), **own}} if own else inner


def adapters_of(node: Tree, prefix: str = "") -> dict[str, Adapter]:
    """Inverse of `insert`: `{path of the weight: its adapter}`."""
    names: Sequence[Any] = (
        range(len(node)) if isinstance(node, list) else sorted(node) if isinstance(node, dict) else ()
    )
    found: dict[str, Adapter] = {}
    for name in names:
        child = node[name]
        if isinstance(child, Adapter):
            found[f"{prefix.removesuffix('lora/')}{name}"] = child
        else:
            found |= adapters_of(child, f"{prefix}{name}/")
    return found


def salts_of(specs: Tree, seed: int | None) -> Salts | None:
    """The salts of a run's dropout masks by step, or None where no adapter of `specs` drops.

    A salt is a function of (seed, step, path of the weight). `seed` None: masks have shapes only, as in a plan.

    >>> salts = salts_of(specs, seed=0)(torch.tensor(0), torch.device("cpu"))
    >>> mmfn.loss(params, replace(batch, salts=salts), model)
    """
    paths = [path for path, adapter in adapters_of(specs).items() if adapter.dropout]
    if not paths:
        return None
    if seed is None:
        keys_A = torch.empty(len(paths), dtype=torch.int64, device="meta")
    else:
        keys_A = torch.tensor([rng.key(seed, "dropout", path) for path in paths])

    def salts(step: Tensor, device: torch.device) -> dict[str, Tensor]:
        salts_A = masks.salts(keys_A, step).to(device)
        return dict(zip(paths, salts_A.unbind(0), strict=True))

    return salts


def with_drops(params: Tree, row_ids: Sequence[tuple[str, Tensor]], salts: Mapping[str, Tensor] | None) -> Tree:
    """The parameters of a model about to compute with a batch, their adapters told what to drop.

    `row_ids`: (beginning of a path, ids of the rows that are computed with there, int64), the first that fits counts
    (`Family.row_ids`). Without salts, as outside of training, and where no adapter drops: `params` themselves. Raises
    ValueError for an adapter that drops where no ids are known.
    """
    if salts is None:
        return params
    drops = {}
    for path, adapter in adapters_of(params).items():
        if path in salts:
            ids = [rows for prefix, rows in row_ids if path.startswith(prefix)]
            if not ids:
                raise UserError(
                    f"the adapter of {path!r} has dropout but the family does not say which rows it computes with; add "
                    "its path to row_ids"
                )
            drops[path] = replace(adapter, drops=Drops(ids_T=ids[0], salt=salts[path]))
    return insert(params, drops)


def add_adapters(params: Tree, specs: Tree, seed: int) -> Tree:
    """`params` of a model with what `specs` has besides, drawn at random (see `lora`), in the model's dtype."""
    values = dict(tree.items(params))
    absent = {path: leaf for path, leaf in tree.items(specs) if path not in values}
    device = next(iter(values.values())).device
    values |= init_params(absent, seed, dtype=model_dtype(params, specs), device=device)
    return tree.map_with_path(lambda path, leaf: values[path], specs)


def merge(params: Tree) -> Tree:
    """The parameters of the plain model that computes the same: `weight + scale * b @ a`, and no adapters.

    Sums are float32 or wider and rounded to the weight's dtype. Leaves are whole tensors.
    """
    if isinstance(params, list):
        return [merge(child) for child in params]
    if not isinstance(params, dict):
        return params
    own = params.get("lora", {})
    return {
        name: merge_weight(child, own[name]) if name in own else merge(child)
        for name, child in params.items()
        if name != "lora"
    }


def without_adapters(params: Tree) -> Tree:
    """The parameters of the plain model, as they were before there were adapters."""
    if isinstance(params, list):
        return [without_adapters(child) for child in params]
    if not isinstance(params, dict):
        return params
    return {name: without_adapters(child) for name, child in params.items() if name != "lora"}


def merge_weight(weight: Tensor, adapter: Adapter) -> Tensor:
    """`merge` of one weight, or of some of its rows with those rows of `b`."""
    dtype = wide(weight.dtype)
    delta: Tensor = adapter.scale * (adapter.b.to(dtype) @ adapter.a.to(dtype))
    return (weight.to(dtype) + delta).to(weight.dtype)
