"""The floating-point operations of a step, from what its batches hold: no device, no tensor of a model, no trace.

A family declares its forward pass as stages in the order of the data (`Family.flow`): which parameters meet which rows,
and what is computed between rows. A matrix costs `2 * rows * elements` forward, as much for its gradient where it is
trained, and as much again for that of its input where something before it is trained. So a frozen encoder counts
forward alone, and what a model reads has no gradient. Attention counts pairs within true segments. What is merely
computed again counts nothing: recomputed blocks, scores in the backward of attention, padding.

    work = work_of(specs, family.flow(cfg))    # once: FLOPs of a token, of a pair of tokens, of a patch, ...
    flops_of(work, counts_of(batch))           # {"vision": 8120320, "text": 51904512}, forward and backward
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from mmfn import tree
from mmfn.batch import IGNORE, Batch
from mmfn.spec import EXPERTS, ParamSpec
from mmfn.tree import Tree

TEXT = "text"  # the part that reads what encoders give
TOKENS = "tokens"  # a count, as are the names below


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """What is computed between rows: FLOPs for each of a `count`, forward, and backward without computing again."""

    count: str
    forward: int
    backward: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Parameters that meet the same rows side by side, and what is computed of their results.

    `parameters`: paths, or beginnings of paths up to a "/"; those that a model lacks count nothing, nor then does the
    `mixing`. `count`: the rows, `share` times each. 0: they multiply no rows, as norms and tables.
    """

    parameters: tuple[str, ...]
    count: str = TOKENS
    share: Fraction | int = 1
    mixing: Mixing | None = None


Flow = Mapping[str, Sequence[Stage]]
"""Stages by part of a model, in order: those of encoders, which read data; "text", which reads what they give; and
those of further losses, under their names, which read what the text gives."""
Work = Mapping[str, Mapping[str, Fraction]]
"""FLOPs of forward and backward by part of a model and by what a batch counts."""


def rows(tower: str) -> str:
    """The count of rows that an encoder computes with."""
    return f"{tower} rows"


def pairs(tower: str, i: int = 0) -> str:
    """The count of pairs within the segments of an encoder's list i."""
    return f"{tower} pairs {i}"


CAUSAL_PAIRS = "token pairs"
"""The count of pairs of a token and one that it sees."""


def labels(i: int) -> str:
    """The count of tokens that are scored i places further ahead."""
    return f"labels {i}" if i else "labels"


def attention(path: str, width: int, pairs: str, count: str = TOKENS) -> list[Stage]:
    """The stages of attention at a path: scores and weighted values of all heads, `width` channels together, for each
    of the `pairs`; backward these are four products."""
    into = tuple(f"{path}/{name}" for name in ("qkv", "q", "k", "v", "q_norm", "k_norm"))
    mixing = Mixing(count=pairs, forward=4 * width, backward=8 * width)
    return [Stage(parameters=into, count=count, mixing=mixing), Stage(parameters=(f"{path}/o",), count=count)]


def block(path: str, mixer: Sequence[Stage], count: str = TOKENS) -> list[Stage]:
    """The stages of a pre-norm block: its mixer, then a feed-forward layer or experts, by the names all blocks use."""
    into = ("mlp/gate", "mlp/up", "moe/router", "moe/experts/gate_up", "moe/shared/gate", "moe/shared/up")
    feed_forward = (("mlp_norm",), (*into, "moe/shared_gate"), ("mlp/down", "moe/experts/down", "moe/shared/down"))
    return [
        Stage(parameters=(f"{path}/attention_norm",), count=count),
        *mixer,
        *(Stage(parameters=tuple(f"{path}/{name}" for name in names), count=count) for names in feed_forward),
    ]


def work_of(specs: Tree, flow: Flow, experts_per_token: int = 0) -> Work:
    """The work of a model by what its batches count. `specs`: those it is trained with, adapters and all.

    `experts_per_token`: of the experts that a stack of them holds, how many a row meets.
    """
    leaves = [_Leaf.of(path, leaf, experts_per_token) for path, leaf in tree.items(specs)]
    work: dict[str, Mapping[str, Fraction]] = {}
    ends: dict[str, bool] = {}  # whether what a part gives depends on a trained leaf
    for part, stages in flow.items():
        is_live = ends[TEXT] if TEXT in ends else part == TEXT and any(ends.values())
        found: dict[str, Fraction] = {}
        for stage in stages:
            own = [leaf for leaf in leaves if leaf.is_of(stage)]
            for leaf in own:
                products = 1 + leaf.is_trained + (is_live or leaf.is_second)
                found[stage.count] = found.get(stage.count, Fraction(0)) + 2 * leaf.elements * stage.share * products
            is_live = is_live or any(leaf.is_trained for leaf in own)
            if own and (mixing := stage.mixing) is not None:
                flops = mixing.forward + mixing.backward * is_live
                found[mixing.count] = found.get(mixing.count, Fraction(0)) + flops
        work[part], ends[part] = {name: n for name, n in found.items() if n}, is_live
    return work


def counts_of(batch: Batch) -> dict[str, int]:
    """What a batch holds, by the names of counts, without its padding. Read on the host."""
    N = batch.num_segments
    lengths_N = torch.bincount(batch.segment_T, minlength=N + 1)[:N]
    counts = {TOKENS: int(lengths_N.sum()), CAUSAL_PAIRS: int((lengths_N * (lengths_N + 1) // 2).sum())}
    for i, labels_T in enumerate((batch.labels_T, *(further.labels_T for further in batch.ahead))):
        counts[labels(i)] = int((labels_T != IGNORE).sum())
    for name, tower in batch.towers.items():
        counts[rows(name)] = int(tower.segments[0].host_N[-1])
        for i, segments in enumerate(tower.segments):
            counts[pairs(name, i)] = int(segments.host_N.diff().long().square().sum())
    return counts


def flops_of(work: Work, counts: Mapping[str, int]) -> dict[str, int]:
    """FLOPs of forward and backward by part of the model."""
    return {part: int(sum(n * counts[name] for name, n in terms.items())) for part, terms in work.items()}


def formula(work: Work) -> str:
    """The work as a sum: `vision: 1.2e+05 vision rows + 64 vision pairs 0; text: 5.4e+04 tokens + ...`."""
    sums = {part: " + ".join(f"{float(n):.4g} {name}" for name, n in terms.items()) for part, terms in work.items()}
    return "; ".join(f"{part}: {terms}" for part, terms in sums.items() if terms)


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """A parameter as its stage sees it. `elements`: what a row is multiplied with; `is_second`: of an adapter's pair,
    so that it reads what the first one gives."""

    path: str
    elements: int
    is_trained: bool
    is_second: bool

    @staticmethod
    def of(path: str, leaf: ParamSpec, experts_per_token: int) -> "_Leaf":
        numel = leaf.numel if len(leaf.shape) > 1 else 0
        if leaf.axes[0] == EXPERTS:
            numel = numel // leaf.shape[0] * experts_per_token
        is_second = "/lora/" in path and path.endswith("/b")
        layer = path.replace("/lora/", "/")
        return _Leaf(path=layer, elements=numel, is_trained=not leaf.is_frozen, is_second=is_second)

    def is_of(self, stage: Stage) -> bool:
        return any(self.path == name or self.path.startswith(f"{name}/") for name in stage.parameters)
