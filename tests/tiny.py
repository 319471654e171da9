"""The one list of tiny models, at least one of every family, and the one generator of samples for any of them.

A family joins all matrices by its line in `TINY`. What a sample holds follows from what the family declares: its towers
say which media there are, its `kinds` which token stands for them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import mmfn
from mmfn import lora, models, rng, spec, tree
from mmfn.batch import AUDIO, IGNORE, IMAGE, TEXT, VIDEO, Media, Sample
from mmfn.models import Family
from mmfn.tree import Tree
from tests.models import toy_family

FIRST_WORD = 5  # tokens below stand for media, or are special
MODULES = {"toy": toy_family}  # families that only tests have


def vision_language(
    model_type: str, *, text: Mapping[str, Any], vision: Mapping[str, Any], sections: Sequence[int], **outer: Any
) -> dict[str, Any]:
    """The config.json of a tiny model of text and merged patches; what is not said is the same for all."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(sections), "mrope_interleaved": True}
    return {
        "model_type": model_type,
        "image_token_id": 1,
        "video_token_id": 2,
        **outer,
        "text_config": {"num_key_value_heads": 2, "head_dim": 2 * sum(sections), "rope_parameters": rope, **text},
        "vision_config": {
            "depth": 2,
            "num_heads": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            **vision,
        },
    }


EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "router_aux_loss_coef": 0.1,
    "output_router_logits": True,
}
SMALL_TOWER = {"depth": 1, "deepstack_visual_indexes": []}


def _qwen3_vl(num_layers: int, experts: Mapping[str, Any] | None = None, **vision: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 61, "hidden_size": 20, "intermediate_size": 28, "num_attention_heads": 8}
    tower = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 2, "temporal_patch_size": 1}
    return vision_language(
        "qwen3_vl_moe" if experts else "qwen3_vl",
        text={**sizes, "num_hidden_layers": num_layers, **(experts or {})},
        vision={**tower, "num_position_embeddings": 9, **vision},
        sections=(2, 1, 1),
        tie_word_embeddings=True,
    )


def _qwen2_5_vl(num_layers: int) -> dict[str, Any]:
    """Windows of 2 x 2 cells, in a tower whose second block attends to whole frames."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1]}
    sizes = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 28, "num_attention_heads": 8}
    tower = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 2, "temporal_patch_size": 1}
    return vision_language(
        "qwen2_5_vl",
        text={**sizes, "num_hidden_layers": num_layers, "rope_parameters": rope},
        vision={**tower, "window_size": 8, "fullatt_block_indexes": [1], "tokens_per_second": 2},
        sections=rope["mrope_section"],
    )


def _glm(num_layers: int) -> dict[str, Any]:
    """A dense block and blocks of experts in groups, one shared; routers whose bias a step moves."""
    experts = {
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 6,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        "router_aux_loss_coef": 0.1,
        "output_router_logits": True,
        "router_bias_update_rate": 0.01,
    }
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12, "rope_parameters": rope}
    sizes = {"vocab_size": 61, "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": num_layers}
    tower = {"depth": 2, "hidden_size": 16, "out_hidden_size": 20, "intermediate_size": 12, "num_heads": 2}
    return {
        "model_type": "glm4v_moe",
        "image_token_id": 1,
        "video_token_id": 2,
        "video_start_token_id": 3,
        "video_end_token_id": 4,
        "text_config": {**sizes, **heads, **experts},
        "vision_config": {**tower, "image_size": 6, "patch_size": 2, "temporal_patch_size": 1},
    }


SOUND = {
    "num_mel_bins": 5,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 10,
    "d_model": 8,
    "downsample_hidden_size": 3,
    "n_window_infer": 200,
}


def _qwen3_omni(num_layers: int) -> dict[str, Any]:
    """The whole model's config, its second text block dense."""
    thinker = _qwen3_vl(num_layers, {**EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [1]}, depth=3)
    heard = {"audio_token_id": 3, "audio_config": {**SOUND, "output_dim": 20}, "position_id_per_seconds": 13}
    del thinker["model_type"]
    return {"model_type": "qwen3_omni_moe", "thinker_config": {**thinker, **heard, "tie_word_embeddings": False}}


DELTA = {
    "layer_types": None,
    "full_attention_interval": 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,  # short keys are divided by their length, which costs digits of float32
    "linear_value_head_dim": 3,
    "linear_conv_kernel_dim": 3,
    "head_dim": 8,
    "partial_rotary_factor": 0.5,
    "mtp_num_hidden_layers": 1,
    "mtp_loss_scaling_factor": 0.3,
}


def _qwen3_5(num_layers: int, experts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Blocks of both kinds by turns, and one that predicts further ahead."""
    sizes = {"vocab_size": 61, "hidden_size": 20, "intermediate_size": 28, "num_attention_heads": 8}
    tower = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 2, "temporal_patch_size": 1, **SMALL_TOWER}
    return vision_language(
        "qwen3_5_moe" if experts else "qwen3_5",
        text={**sizes, **DELTA, "num_hidden_layers": num_layers, **(experts or {})},
        vision={**tower, "num_position_embeddings": 9},
        sections=(1, 1, 0),
        tie_word_embeddings=not experts,
    )


TINY: dict[str, Callable[[int], dict[str, Any]]] = {  # text blocks -> config.json
    "dense": _qwen3_vl,
    "small": lambda num_layers: _qwen3_vl(num_layers, **SMALL_TOWER),
    "moe": lambda num_layers: _qwen3_vl(num_layers, EXPERTS),
    "windows": _qwen2_5_vl,
    "glm": _glm,
    "omni": _qwen3_omni,
    "delta": _qwen3_5,
    "delta_moe": lambda num_layers: _qwen3_5(num_layers, {**EXPERTS, "shared_expert_intermediate_size": 10}),
    "toy": lambda num_layers: {"model_type": "toy", "num_layers": num_layers},
}
MARKS = {"glm4v_moe": {VIDEO: ((3,), (4,))}}  # tokens before and behind a medium, without which it is of another kind


def family(model_type: str) -> Family:
    """A family of mmfn, or of tests alone."""
    if model_type in MODULES:
        return models.family_of(MODULES[model_type], model_type)
    return models.family(model_type)


def family_of(name: str) -> Family:
    """The family of a tiny model."""
    return family(TINY[name](2)["model_type"])


@cache
def has_experts(name: str) -> bool:
    """Whether blocks of a tiny model have experts."""
    family_ = family_of(name)
    return spec.has_experts(family_.specs(family_.config_from_hf(TINY[name](2))))


@cache
def model_of(name: str, num_layers: int = 2) -> mmfn.Model:
    """A model whose weights, biases and norms all matter, in float64; not to change."""
    hf_config = TINY[name](num_layers)
    family_ = family(hf_config["model_type"])
    cfg = family_.config_from_hf(hf_config)
    g = torch.Generator().manual_seed(1)

    def draw(leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=g, dtype=torch.float64)
        return leaf + 0.1 * noise if leaf.ndim == 1 else noise * leaf.shape[-1] ** -0.5

    params = tree.map(draw, spec.init_params(family_.specs(cfg), 0))
    return mmfn.Model(family=family_, cfg=cfg, params=params, hf_config=hf_config)


# ---- what is trained


def _towers(family: Family, cfg: Any) -> list[str]:
    *towers, _ = family.stacks(cfg)
    return [rf"{name}/.*" for name in towers]


def _linear(family: Family, cfg: Any, beginnings: Iterable[str]) -> list[str]:
    """Layers whose path begins so, but for stacks of experts and their routers."""
    paths = [path for path in lora.layers(family.specs(cfg)) if "experts" not in path and "router" not in path]
    return [path for path in paths if path.startswith(tuple(beginnings))]


def _decoder(family: Family, cfg: Any) -> Tree:
    *_, text = family.stacks(cfg)
    return spec.freeze(family.specs(cfg), [*_towers(family, cfg), f"{text}/embed/.*"])


def _second_block(family: Family, cfg: Any) -> Tree:
    *_, text = family.stacks(cfg)
    return spec.freeze(family.specs(cfg), [*_towers(family, cfg), f"{text}/(embed|norm|layers/0)/.*"])


def _lora(family: Family, cfg: Any) -> Tree:
    experts = [path for path, leaf in tree.items(family.specs(cfg)) if leaf.axes[0] == "experts"]
    return lora.lora(family.specs(cfg), rank=3, alpha=2.0, targets=[*family.lora_targets, *experts])


def _lora_of_all(family: Family, cfg: Any) -> Tree:
    *_, text = stacks = list(family.stacks(cfg))
    targets = _linear(family, cfg, [f"{name}/layers/" for name in stacks])
    return lora.lora(family.specs(cfg), rank=2, alpha=2.0, targets=targets, is_rs=True, keep=[rf"{text}/norm/.*"])


def _lora_of_the_tower(family: Family, cfg: Any) -> Tree:
    """One layer of each of its blocks."""
    tower = next(iter(family.stacks(cfg)))
    first = f"{tower}/layers/0/"
    *_, layer = _linear(family, cfg, [first])
    target = rf"{tower}/layers/\d+/{layer.removeprefix(first)}"
    return lora.lora(family.specs(cfg), rank=4, alpha=16.0, targets=[target])


def _lora_with_dropout(family: Family, cfg: Any) -> Tree:
    """Adapters wherever the family says which rows are computed with."""
    batch = family.pack([family.example(8, 2, cfg)], cfg)
    targets = _linear(family, cfg, [beginning for beginning, _ in family.row_ids(batch, cfg)])
    return lora.lora(family.specs(cfg), rank=3, alpha=4.0, targets=targets, dropout=0.3)


TRAINED: dict[str, Callable[[Family, Any], Tree]] = {  # (family, cfg) -> specs that say what is trained
    "all": lambda family, cfg: family.specs(cfg),
    "decoder": _decoder,
    "second block": _second_block,
    "lora": _lora,
    "lora of all": _lora_of_all,
    "lora of the tower": _lora_of_the_tower,
    "lora with dropout": _lora_with_dropout,
}


def with_adapters(params: Tree, specs: Tree) -> Tree:
    """Copies of the parameters, and adapters that matter: none of their leaves is zero."""

    def draw(path: str, leaf: Tensor) -> Tensor:
        if "/lora/" not in path:
            return leaf.clone()
        return torch.randn(leaf.shape, generator=rng.generator(2, path), dtype=leaf.dtype) * leaf.shape[-1] ** -0.5

    return tree.map_with_path(draw, lora.add_adapters(params, specs, 0))


# ---- comparison

NOISE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 1e-1}


def scale_of(want: Tensor, dtype: torch.dtype) -> Tensor:
    """What an error is relative to: the leaf's largest value, but no less than `NOISE`: the gradient of a bias of keys
    without rope is 0, as it shifts all scores of a query alike, and what is found is rounding."""
    return want.abs().max().double().clamp(min=NOISE[dtype])


# ---- samples

Draw = Callable[[int, int], int]  # (least, most) -> a number
GRIDS: dict[int, Callable[[Draw, int], tuple[int, int, int]]] = {  # inputs of a unit -> (time, height, width)
    IMAGE: lambda draw, unit: (1, 2 * draw(1, 2), 2 * draw(1, 3)),
    VIDEO: lambda draw, unit: (draw(2, 3), 2 * draw(1, 2), 2 * draw(1, 3)),
    AUDIO: lambda draw, unit: (draw(1, 5 * unit // 2), 1, 1),
}
KINDS = {IMAGE: "image", VIDEO: "video", AUDIO: "audio"}


def media_kinds(family: Family, cfg: Any) -> tuple[int, ...]:
    """The kinds of media a model reads."""
    return tuple(kind for tower in family.towers(cfg).values() for kind in tower.media)


def written(family: Family, cfg: Any, kind: int, num_features: int) -> list[tuple[int, Tensor]]:
    """Kinds and tokens of what stands for a medium: its token, once per feature, between its marks."""
    marks = MARKS.get(family.name, {}).get(kind, ((), ()))
    before_M, after_M = (torch.tensor(mark, dtype=torch.int64) for mark in marks)
    tokens_V = torch.cat([before_M, torch.arange(cfg.vocab_size)])
    place = (family.kinds(tokens_V, cfg) == kind).nonzero()[0]
    return [(TEXT, before_M), (kind, tokens_V[place].expand(num_features)), (TEXT, after_M)]


def sample(family: Family, cfg: Any, number: int, kinds: Sequence[int], *, is_supervised: bool = True) -> Sample:
    """Words, then media of the given kinds, each followed by words; about half the words are supervised.

    `number` is the seed.
    """
    g = torch.Generator().manual_seed(number)
    towers = {kind: tower for tower in family.towers(cfg).values() for kind in tower.media}
    media: dict[int, list[Media]] = {kind: [] for kind in GRIDS}

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    def text() -> tuple[int, Tensor]:
        return TEXT, torch.randint(FIRST_WORD, cfg.vocab_size, (draw(2, 9),), generator=g)

    parts = [text()]
    for kind in kinds:
        tower = towers[kind]
        grid = GRIDS[kind](draw, tower.inputs)
        inputs_UF = torch.randn(prod(grid), tower.values, generator=g)
        whole_UF = pad(inputs_UF, (0, 0, 0, -prod(grid) % tower.inputs))  # units
        media[kind].append(Media(inputs_UF=whole_UF, grid=grid, seconds_per_grid=0.7))
        num_tokens = family.data.num_tokens(KINDS[kind], media[kind][-1], cfg)
        parts += [*written(family, cfg, kind, num_tokens), text()]
    tokens_T = torch.cat([tokens for _, tokens in parts])
    kinds_T = torch.cat([torch.full_like(tokens, kind) for kind, tokens in parts])
    is_label_T = (kinds_T == TEXT) & (torch.rand(tokens_T.shape, generator=g) < 0.5) & is_supervised
    return Sample(
        tokens_T=tokens_T,
        labels_T=torch.where(is_label_T, tokens_T, IGNORE),
        kinds_T=kinds_T,
        images=tuple(media[IMAGE]),
        videos=tuple(media[VIDEO]),
        audios=tuple(media[AUDIO]),
        id=str(number),
        number=number,
    )


def random_samples(
    model: mmfn.Model, seed: int, num: int, *, kinds: Sequence[int] | None = None, is_numbered: bool = True
) -> list[Sample]:
    """Conversations with up to two media each, of any of `kinds` (default: all that the model reads)."""
    g = torch.Generator().manual_seed(seed)
    kinds = kinds or media_kinds(model.family, model.cfg)
    found = []
    for i in range(num):
        media = torch.randint(len(kinds), (int(torch.randint(3, (), generator=g)),), generator=g)
        one = sample(model.family, model.cfg, 100 * seed + i, [kinds[k] for k in media])
        found.append(one if is_numbered else replace(one, number=None))
    return found
