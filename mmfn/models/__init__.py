"""Model families as pure functions. `family(model_type)` returns one as a record; `FAMILIES` lists them."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from mmfn.models.keymap import KeyMap
from mmfn.tree import Tree

if __name__ != "mmfn.models":
    raise ImportError("the folder `models` is a link to the package mmfn.models; write `import mmfn.models`")


@dataclass(frozen=True, kw_only=True)
class Output:
    """What `apply` returns: `hidden_TD` before the head, `aux` (see `layers.moe.total`), `cache` in generation."""

    hidden_TD: Tensor
    aux: Tree = None
    cache: Tree = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """The functions every family module defines, under the same names.

    Code shared by the families reads these fields of a Config: `vocab_size`, `num_layers`, `image_token_id`,
    `video_token_id`, `decoder` (a `layers.decoder.DecoderConfig`, or one with its `num_heads` and `num_kv_heads`) and
    `vision` (a `layers.vision.VisionConfig`, or one like it); where `apply` returns router statistics as `aux`, also
    `router_aux_coef` and `moe` (a `layers.moe.MoeConfig`). Blocks of the text lie under `text/layers`. A new family is
    one module with these functions and one line in `FAMILIES`.
    """

    name: str
    config_from_hf: Callable[[Mapping[str, Any]], Any]  # config.json -> Config
    specs: Callable[[Any], Tree]  # cfg -> tree of ParamSpec
    apply: Callable[..., Output]  # (params, batch, cfg, ops, cache=None)
    head: Callable[..., Tensor]  # (params, cfg, ops) -> weight_VD
    positions: Callable[..., Tensor]  # (sample, cfg) -> int64[3, T]
    key_map: Callable[[Any], KeyMap]
    parts: Callable[[Any], Mapping[str, str]]  # cfg -> regexes over the paths of the parts a run can name
    empty_cache: Callable[..., Any]  # (cfg, num_rows, num_columns, dtype, device) -> a tree per layer, for generation


FAMILIES = {
    "qwen3_vl": "mmfn.models.qwen3_vl",
    "qwen3_vl_moe": "mmfn.models.qwen3_vl_moe",
}


def family(model_type: str) -> Family:
    """The family of a `model_type` in a Hugging Face config. Raises ValueError naming the nearest known one."""
    if model_type not in FAMILIES:
        near = get_close_matches(model_type, FAMILIES, n=1, cutoff=0.0)
        raise ValueError(
            f"model_type {model_type!r} is not supported; nearest is {near[0]!r}, known: {sorted(FAMILIES)}"
        )
    module = importlib.import_module(FAMILIES[model_type])
    functions = {f.name: getattr(module, f.name) for f in fields(Family) if f.name != "name"}
    return Family(name=model_type, **functions)
