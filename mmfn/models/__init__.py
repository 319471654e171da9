"""Model families as pure functions. `family(model_type)` returns one as a record; `FAMILIES` lists them."""

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from mmfn.batch import Batch, Laid, Sample, TowerKind, in_floats
from mmfn.errors import UserError
from mmfn.models.data import DataSide
from mmfn.models.keymap import KeyMap
from mmfn.models.work import Flow
from mmfn.packing import Sizes, pack, read_alike
from mmfn.spec import stacks
from mmfn.tree import Tree

if __name__ != "mmfn.models":
    raise ImportError("the folder `models` is a link to the package mmfn.models; write `import mmfn.models`")


Loss = Callable[[], Tensor]
"""A loss beside cross entropy: computes this rank's share of its value, 0-D; called where its weight is not 0."""


Further = Callable[[], Tensor]
"""Hidden states [T, D] that the head scores for a token further ahead; computed where its cross entropy counts."""


AHEAD = "ce_ahead_"  # what names of losses of tokens further ahead begin with


def ahead_loss(i: int) -> str:
    """The name of the cross entropy of the token that `Batch.ahead[i]` names: `ce_ahead_1`, ..."""
    return f"{AHEAD}{i + 1}"


@dataclass(frozen=True, kw_only=True)
class Output:
    """What `apply` returns.

    `hidden_TD` before the head; `ahead[i]` gives the same for the tokens that `Batch.ahead[i]` names. `losses` by name,
    each a mean over a batch: the objective adds up those that count, and they are metrics; how much each counts, and
    the cross entropies ahead (`ahead_loss`), is in `Family.loss_weights`. `stats`: further metrics, 0-D sums over
    tokens. `counts`: sums over tokens that leaves trained by a rule are updated from, by path (`Family.rules`). `cache`
    in generation.
    """

    hidden_TD: Tensor
    ahead: tuple[Further, ...] = ()
    losses: Mapping[str, Loss] = field(default_factory=dict)
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    cache: Tree = None


Rule = Callable[[Tensor], Tensor]
"""counts, summed over all tokens of a step -> what is added to the leaf; both whole, float32 or wider."""


def no_rules(cfg: Any) -> dict[str, Rule]:
    """Of a family whose leaves are all trained by gradients."""
    return {}


def no_losses(cfg: Any) -> dict[str, float]:
    """Of a family that learns from cross entropy alone."""
    return {}


def nothing(cfg: Any) -> int:
    """Of a family without it."""
    return 0


def never(cfg: Any) -> bool:
    """Of a family without it."""
    return False


def same(cfg: Any, names: Collection[str]) -> Any:
    """Of a family whose checkpoints hold all that their config names."""
    return cfg


@dataclass(frozen=True, kw_only=True)
class Family:
    """What every family module defines, under the same names.

    Code shared by the families reads these fields of a Config: `vocab_size` and `decoder`, with its `num_heads` and
    `num_kv_heads`. In the tree of parameters blocks of a stack lie under `NAME/layers`, NAME a tower's where it has
    one, those of the decoder under `text/layers`, and a head of its own under `head`; what computes `Output.ahead`
    alone under `mtp`, its blocks called behind those of the decoder. A new family is one module with these functions
    and one line in `FAMILIES`.
    """

    name: str
    # the model
    config_from_hf: Callable[[Mapping[str, Any]], Any]  # config.json -> Config
    specs: Callable[[Any], Tree]  # cfg -> tree of ParamSpec
    apply: Callable[..., Output]  # (params, batch, cfg, ops, cache=None)
    head: Callable[..., Tensor]  # (params, cfg, ops) -> weight_VD
    key_map: Callable[[Any], KeyMap]
    parts: Callable[[Any], Mapping[str, str]]  # cfg -> regexes over the paths of the parts a run can name
    at_depth: Callable[[Any, int], Any]  # (cfg, n) -> the config with n blocks in the last stack
    empty_cache: Callable[..., Any]  # (cfg, num_rows, num_columns, dtype, device) -> a tree per layer, for generation
    lora_targets: tuple[str, ...]  # regexes over the layers that get adapters where nobody names any
    # samples and batches
    positions: Callable[[Sample, Any], Tensor]  # -> float32[3, T]
    towers: Callable[[Any], Mapping[str, TowerKind]]  # cfg -> how each encoder reads
    lay: Callable[[Sample, Any], Mapping[str, Laid]]  # what each encoder reads of a sample
    kinds: Callable[[Tensor, Any], Tensor]  # (tokens_T, cfg) -> kinds_T
    data: DataSide  # media, chats, and what processors return
    example: Callable[[int, int, Any], Sample]  # (tokens, side of an image in inputs of its encoder, cfg): to plan with
    row_ids: Callable[[Batch, Any], Sequence[tuple[str, Tensor]]]  # see `mmfn.lora.with_drops`
    flow: Callable[[Any], Flow]  # cfg -> the stages of the forward pass, of which FLOPs are counted
    # what not all families have
    taps: Callable[[Any], int] = nothing  # cfg -> how many of the first text blocks are treated unlike the others
    experts_per_token: Callable[[Any], int] = nothing  # cfg -> of those that blocks with experts have
    is_recurrent: Callable[[Any], bool] = never  # cfg -> whether layers carry a state from token to token
    num_ahead: Callable[[Any], int] = nothing  # cfg -> further tokens that are predicted
    without_absent: Callable[[Any, Collection[str]], Any] = (
        same  # (cfg, names of a checkpoint's tensors) -> the config of what it holds, of parts that it may lack
    )
    loss_weights: Callable[[Any], Mapping[str, float]] = no_losses  # cfg -> weight of each further loss by name
    rules: Callable[[Any], Mapping[str, Rule]] = (
        no_rules  # cfg -> how leaves without a gradient are updated, by `ParamSpec.rule`
    )

    def stacks(self, cfg: Any) -> dict[str, int]:
        """How many blocks each stack has, that of the text last: what `specs` declares."""
        return {name: len(blocks) for name, blocks in stacks(self.specs(cfg)).items()}

    def pack(self, samples: Sequence[Sample], cfg: Any, sizes: Sizes | None = None) -> Batch:
        """Samples end to end in one batch (`mmfn.packing.pack`), by default exactly as large as they need.

        Raises ValueError for samples that do not fit the model or the sizes.
        """
        return in_floats(self.pack_bytes(samples, cfg, sizes))

    def pack_bytes(self, samples: Sequence[Sample], cfg: Any, sizes: Sizes | None = None) -> Batch:
        """`pack` for `mmfn.batch.to`: what media have as bytes are bytes still, a quarter of the memory up to there."""
        kinds = self.towers(cfg)
        samples = read_alike(samples, kinds)
        positions, laid = [self.positions(s, cfg) for s in samples], [self.lay(s, cfg) for s in samples]
        return pack(samples, positions, laid, kinds, sizes or Sizes(), self.num_ahead(cfg))


FAMILIES = {
    "glm4v_moe": "mmfn.models.glm4v_moe",
    "qwen2_5_vl": "mmfn.models.qwen2_5_vl",
    "qwen3_5": "mmfn.models.qwen3_5",
    "qwen3_5_moe": "mmfn.models.qwen3_5",
    "qwen3_vl": "mmfn.models.qwen3_vl",
    "qwen3_vl_moe": "mmfn.models.qwen3_vl_moe",
    "qwen3_omni_moe": "mmfn.models.qwen3_omni",
}
ALIASES = {"qwen3_omni_moe_thinker": "qwen3_omni_moe"}
"""Model types of a part that is saved alone -> the family it is of, which tells it from the whole by the config."""


def family(model_type: str) -> Family:
    """The family of a `model_type` in a Hugging Face config. Raises ValueError naming the nearest known one."""
    model_type = ALIASES.get(model_type, model_type)
    if model_type not in FAMILIES:
        near = get_close_matches(model_type, FAMILIES, n=1, cutoff=0.0)
        raise UserError(
            f"model_type {model_type!r} is not supported; nearest is {near[0]!r}, known: {sorted(FAMILIES)}"
        )
    return family_of(importlib.import_module(FAMILIES[model_type]), model_type)


def family_of(module: Any, name: str) -> Family:
    """The record of a module (or any object) with a family's functions; those with a default may be absent."""
    declared = [f for f in fields(Family) if f.name != "name" and (f.default is MISSING or hasattr(module, f.name))]
    return Family(name=name, **{f.name: getattr(module, f.name) for f in declared})
