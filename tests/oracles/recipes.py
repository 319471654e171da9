"""Tiny configs of transformers, one recipe per model type: a base that tests change, and random ones.

Names of special tokens: ids below `FIRST_WORD` stand for media or mark their ends, the same in all types.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

from tests.tiny import FIRST_WORD, vision_language

PAD_ID, IMAGE_ID, VIDEO_ID, START_ID, END_ID = range(FIRST_WORD)
AUDIO_ID, AUDIO_START_ID, AUDIO_END_ID = range(FIRST_WORD, FIRST_WORD + 3)  # of a type that hears
VIDEO_START_ID, VIDEO_END_ID = FIRST_WORD, FIRST_WORD + 1  # of a type that marks whole videos

Values = dict[str, Any]
Parts = dict[str, Values]  # "text", "vision", "audio", "outer": keywords of `config`

SIZES = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
TOWER = {"hidden_size": 24, "intermediate_size": 40, "patch_size": 3, "temporal_patch_size": 2}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 22}
VISION_ENDS = {"vision_start_token_id": START_ID, "vision_end_token_id": END_ID}
SOUND = {"audio_token_id": AUDIO_ID, "audio_start_token_id": AUDIO_START_ID, "audio_end_token_id": AUDIO_END_ID}
IMAGE_ENDS = {"image_start_token_id": START_ID, "image_end_token_id": END_ID}
VIDEO_ENDS = {"video_start_token_id": VIDEO_START_ID, "video_end_token_id": VIDEO_END_ID}
DELTA = {
    "num_hidden_layers": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
AUDIO = {
    "num_mel_bins": 11,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 30,
    "d_model": 12,
    "downsample_hidden_size": 5,
    "n_window": 50,  # the library takes 13 tokens per 100 frames for granted
    "n_window_infer": 200,
    "max_source_positions": 13,
}
DENSE_SECOND = {"num_hidden_layers": 3, "mlp_only_layers": [1]}
ATTENTION_SECOND = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
OLDER = ("mrope_interleaved", "deepstack_visual_indexes", "num_position_embeddings")  # what older types lack


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How tiny configs of one model type are made.

    `text`, `vision`, `audio`, `outer`: what its base has beside or instead of what all have. `without`: what only the
    others have. `rotary`: the part of a head that turns. `mixed`: text of 3 layers of all kinds. `vary`: draws what
    only this type has, given what was drawn for all. `first_word`: the least id that is no special token.
    """

    classes: tuple[Any, Any]
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    audio: Mapping[str, Any] | None = None
    outer: Mapping[str, Any] = field(default_factory=lambda: VISION_ENDS)
    without: tuple[str, ...] = ()
    sections: tuple[int, int, int] = (4, 2, 2)
    rotary: float = 1.0
    mixed: Mapping[str, Any] = field(default_factory=lambda: {"num_hidden_layers": 3})
    vary: Callable[[random.Random, tuple[int, int, int], Parts], None] = lambda r, sections, parts: None
    first_word: int = FIRST_WORD + 3


def config(
    *,
    family: str = "qwen3_vl",
    sections: tuple[int, int, int] | None = None,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    audio: Mapping[str, Any] | None = None,
    **outer: Any,
) -> Any:
    """A tiny config of a model type; `text`, `vision`, `audio` and keywords override values of its base."""
    recipe = RECIPES[family]
    sections = sections or recipe.sections
    values = vision_language(
        family,
        text={**SIZES, **recipe.text, **(text or {})},
        vision={**TOWER, **recipe.vision, **(vision or {})},
        sections=sections,
        **({"tie_word_embeddings": True} | dict(recipe.outer) | outer),
    )
    del values["model_type"]
    decoder, tower = values["text_config"], values["vision_config"]
    if recipe.rotary != 1:
        decoder["rope_parameters"]["partial_rotary_factor"] = rotary = decoder.pop("rotary", recipe.rotary)
        decoder["head_dim"] = round(2 * sum(sections) / rotary)
    for name in recipe.without:
        for part in (decoder, decoder["rope_parameters"], tower):
            part.pop(name, None)
    if recipe.audio is not None:
        values["audio_config"] = {**recipe.audio, "output_dim": decoder["hidden_size"], **(audio or {})}
    return recipe.classes[0](**values)


def random_config(seed: int, family: str = "qwen3_vl") -> Any:
    """A config with odd widths, any head ratio, depth, rope sections, tying, deepstack and patch shape.

    With experts: any number of them, of chosen ones and of layers that have none.
    """
    r = random.Random(f"config {seed}")
    sections = r.choice([(4, 2, 2), (2, 1, 1), (1, 1, 1), (5, 3, 3), (3, 4, 2), (0, 2, 3), (4, 0, 0)])
    num_kv_heads, depth, vision_heads = r.choice([1, 2, 3]), r.choice([1, 2, 3]), r.choice([1, 2, 3])
    text = {
        "vocab_size": r.choice([61, 97, 128]),
        "hidden_size": r.choice([9, 24, 33, 40]),
        "intermediate_size": r.choice([7, 31, 48]),
        "num_hidden_layers": r.choice([1, 2, 3]),
        "num_attention_heads": num_kv_heads * r.choice([1, 2, 3]),
        "num_key_value_heads": num_kv_heads,
        "attention_bias": r.random() < 0.3,
        "rms_norm_eps": r.choice([1e-6, 1e-5, 1e-3]),
    }
    blocks = range(depth + 1)  # one past the end: listed in the config, never reached
    vision = {
        "depth": depth,
        "hidden_size": 4 * vision_heads * r.choice([1, 2, 3]),
        "intermediate_size": r.choice([5, 22, 32]),
        "num_heads": vision_heads,
        "hidden_act": r.choice(["gelu_pytorch_tanh", "gelu_pytorch_tanh", "gelu"]),
        "in_channels": r.choice([1, 3, 3]),
        "patch_size": r.choice([1, 2, 3]),
        "spatial_merge_size": r.choice([1, 2, 2, 3]),
        "temporal_patch_size": r.choice([1, 2]),
        "num_position_embeddings": r.choice([1, 4, 9, 12, 25]),
        "deepstack_visual_indexes": r.sample(blocks, r.randint(0, len(blocks))),
    }
    parts = {"text": text, "vision": vision, "audio": {}, "outer": {"tie_word_embeddings": r.random() < 0.5}}
    RECIPES[family].vary(r, sections, parts)
    outer = parts.pop("outer")
    return config(family=family, sections=sections, **parts, **outer)


# ---- what only some types have


def _experts(r: random.Random, sections: tuple[int, int, int], parts: Parts) -> None:
    text = parts["text"]
    num_layers = text["num_hidden_layers"]
    text |= {
        "num_experts": r.randint(4, 16),
        "num_experts_per_tok": r.randint(1, 4),
        "moe_intermediate_size": r.choice([3, 8, 13, 20]),
        "decoder_sparse_step": r.choice([1, 1, 2]) if num_layers > 1 else 1,
        "mlp_only_layers": r.choice([[], [], [0]]) if num_layers > 1 else [],
        "router_aux_loss_coef": r.choice([0.001, 0.1]),
    }


def _windows(r: random.Random, sections: tuple[int, int, int], parts: Parts) -> None:
    """Qwen2.5-VL: heads fill the width, windows of any size, and blocks that see whole frames."""
    text, vision = parts["text"], parts["vision"]
    del text["attention_bias"]
    text["hidden_size"] = text["num_attention_heads"] * 2 * sum(sections)
    cell = vision["patch_size"] * vision["spatial_merge_size"]
    blocks = range(vision["depth"] + 1)
    vision |= {
        "hidden_act": "silu",
        "window_size": cell * r.choice([1, 2, 3]) + r.randrange(cell),  # not always whole cells
        "fullatt_block_indexes": r.sample(blocks, r.randint(0, len(blocks))),
        "tokens_per_second": r.choice([1, 2, 4]),
    }


def _delta(r: random.Random, sections: tuple[int, int, int], parts: Parts) -> None:
    """Qwen3.5: layers of both kinds in any order, and the part of a head that turns."""
    text, num_key_heads = parts["text"], r.choice([1, 2, 3])
    num_layers = text["num_hidden_layers"] = r.choice([1, 2, 3, 4, 5])
    kinds = ["linear_attention", "full_attention"]
    text |= {
        "rotary": r.choice([0.25, 0.5, 1.0]),
        "linear_num_key_heads": num_key_heads,
        "linear_num_value_heads": num_key_heads * r.choice([1, 2, 3]),
        "linear_key_head_dim": r.choice([4, 5, 8, 16]),  # of 2, keys near 0 would make float32 hopeless
        "linear_value_head_dim": r.choice([3, 6, 8, 13]),
        "linear_conv_kernel_dim": r.choice([2, 3, 4, 4]),
    }
    if r.random() < 0.5:
        text["layer_types"] = [r.choice(kinds) for _ in range(num_layers)]
    else:
        text["full_attention_interval"] = r.choice([2, 3, 4])


def _delta_and_experts(r: random.Random, sections: tuple[int, int, int], parts: Parts) -> None:
    _delta(r, sections, parts)
    del parts["text"]["intermediate_size"]
    parts["text"] |= {
        "num_experts": r.randint(4, 12),
        "num_experts_per_tok": r.randint(1, 4),
        "moe_intermediate_size": r.choice([3, 8, 13]),
        "shared_expert_intermediate_size": r.choice([4, 7, 16]),
        "router_aux_loss_coef": r.choice([0.001, 0.1]),
    }


def _hearing(r: random.Random, sections: tuple[int, int, int], parts: Parts) -> None:
    """Qwen3-Omni: sound in windows of 100 to 400 frames; weights of experts divided by their sum or not."""
    _experts(r, sections, parts)
    parts["text"]["norm_topk_prob"] = r.random() < 0.5
    heads = r.choice([1, 2, 3])
    parts["audio"] |= {
        "num_mel_bins": r.choice([5, 8, 13]),
        "encoder_layers": r.choice([1, 2, 3]),
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": r.choice([5, 18, 24]),
        "d_model": heads * r.choice([4, 6]),
        "downsample_hidden_size": r.choice([3, 4, 7]),
        "n_window_infer": r.choice([100, 200, 400]),
        "conv_chunksize": r.choice([1, 3, 500]),
    }
    parts["outer"]["position_id_per_seconds"] = r.choice([13, 25])


def _groups(r: random.Random, sections: tuple[int, int, int], parts: Parts) -> None:
    """GLM-4.5V: groups of experts, shared ones, dense first layers; a table of positions of any side."""
    text, vision = parts["text"], parts["vision"]
    groups, per_group = r.choice([1, 2, 4]), r.choice([2, 3, 5])
    best = r.randint(1, groups)
    text |= {
        "rotary": r.choice([0.5, 0.5, 1.0]),
        "n_group": groups,
        "topk_group": best,
        "n_routed_experts": groups * per_group,
        "num_experts_per_tok": r.randint(1, min(4, best * per_group)),
        "n_shared_experts": r.choice([1, 1, 2]),
        "moe_intermediate_size": r.choice([3, 8, 13]),
        "first_k_dense_replace": r.randrange(text["num_hidden_layers"]),
        "routed_scaling_factor": r.choice([1.0, 1.5, 2.5]),
        "norm_topk_prob": r.random() < 0.7,
        "router_aux_loss_coef": r.choice([0.0001, 0.1]),
    }
    vision |= {
        "hidden_act": "silu",
        "image_size": vision["patch_size"] * r.choice([1, 2, 3, 5]),
        "rms_norm_eps": r.choice([1e-5, 1e-3]),
    }


T = transformers
RECIPES = {
    "qwen3_vl": Recipe(classes=(T.Qwen3VLConfig, T.Qwen3VLForConditionalGeneration), first_word=FIRST_WORD),
    "qwen3_vl_moe": Recipe(
        classes=(T.Qwen3VLMoeConfig, T.Qwen3VLMoeForConditionalGeneration),
        text=EXPERTS,
        mixed=DENSE_SECOND,
        vary=_experts,
        first_word=FIRST_WORD,
    ),
    "qwen2_5_vl": Recipe(
        classes=(T.Qwen2_5_VLConfig, T.Qwen2_5_VLForConditionalGeneration),
        text={"hidden_size": 32},
        vision={
            "hidden_act": "silu",
            "depth": 3,
            "window_size": 12,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        without=(*OLDER, "head_dim", "attention_bias"),
        sections=(2, 1, 1),
        vary=_windows,
    ),
    "qwen3_5": Recipe(
        classes=(T.Qwen3_5Config, T.Qwen3_5ForConditionalGeneration),
        text=DELTA,
        without=("deepstack_visual_indexes",),
        sections=(2, 1, 1),
        rotary=0.25,
        mixed=ATTENTION_SECOND,
        vary=_delta,
    ),
    "qwen3_5_moe": Recipe(
        classes=(T.Qwen3_5MoeConfig, T.Qwen3_5MoeForConditionalGeneration),
        text={**DELTA, **EXPERTS, "shared_expert_intermediate_size": 14},
        without=("deepstack_visual_indexes",),
        sections=(2, 1, 1),
        rotary=0.25,
        mixed=ATTENTION_SECOND,
        vary=_delta_and_experts,
    ),
    "qwen3_omni_moe": Recipe(
        classes=(T.Qwen3OmniMoeThinkerConfig, T.Qwen3OmniMoeThinkerForConditionalGeneration),
        text=EXPERTS,
        audio=AUDIO,
        mixed=DENSE_SECOND,
        outer={**VISION_ENDS, **SOUND, "position_id_per_seconds": 13},
        vary=_hearing,
    ),
    "glm4v_moe": Recipe(
        classes=(T.Glm4vMoeConfig, T.Glm4vMoeForConditionalGeneration),
        text={
            "num_hidden_layers": 3,
            "moe_intermediate_size": 22,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
        },
        vision={"hidden_act": "silu", "image_size": 12},
        outer={**IMAGE_ENDS, **VIDEO_ENDS},
        without=OLDER,
        sections=(2, 1, 1),
        rotary=0.5,
        vary=_groups,
    ),
}


def model_type(cfg: Any) -> str:
    """The key of `RECIPES` that a config belongs to."""
    return next(name for name, recipe in RECIPES.items() if type(cfg) is recipe.classes[0])
