"""The models and batches of `step.py`: a decoder of about 30 M parameters in each family, and rows for its towers.

A size is "decoder" (Qwen3-VL with a trivial tower and no images), "vlm" (the same behind a tower of 6 blocks), "tiny",
or a model type: that family's decoder of the same width and depth behind the same tower, its experts as large together
as the dense layer. Every row of the last ones has an image of 224 x 224 and, where a family hears, 3 seconds of sound.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from mmfn.batch import AUDIO, IGNORE, IMAGE

FIRST_WORD = 16  # tokens below are special
IDS = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
MARKS = {"image_start_token_id": 3, "image_end_token_id": 4, "video_start_token_id": 5, "video_end_token_id": 6}
SOUND = {"audio_token_id": 7, "audio_start_token_id": 8, "audio_end_token_id": 9}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192}
LINEAR = {  # heads as they are published, as many to a width as in the smallest size
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
SHARED = {"shared_expert_intermediate_size": 192}
GROUPS = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
INTERLEAVED = {"mrope_section": [12, 10, 10], "mrope_interleaved": True}  # of heads of 64 channels
PARTLY = {"mrope_section": [3, 3, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
POSITIONS = {"patch_size": 16, "num_position_embeddings": 196}
TAPPED = {**POSITIONS, "deepstack_visual_indexes": [1, 3]}
FRAMES, MELS = 300, 128  # of sound: 3 seconds
AUDIO_TOWER = {
    "d_model": 384,
    "encoder_layers": 6,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "num_mel_bins": MELS,
    "n_window": 50,
    "n_window_infer": 400,
    "downsample_hidden_size": 64,
}
Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the library calls a family, and how its config differs: of rope, the text, the tower and around them."""

    classes: tuple[Any, Any]
    rope: Values = field(default_factory=lambda: INTERLEAVED)
    text: Values = field(default_factory=dict)
    vision: Values = field(default_factory=lambda: TAPPED)
    outer: Values = field(default_factory=lambda: IDS)
    audio: Values | None = None


RECIPES = {
    "qwen3_vl": Recipe(classes=(transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration)),
    "qwen3_vl_moe": Recipe(
        classes=(transformers.Qwen3VLMoeConfig, transformers.Qwen3VLMoeForConditionalGeneration), text=EXPERTS
    ),
    "qwen2_5_vl": Recipe(
        classes=(transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
        rope={"mrope_section": [12, 10, 10]},
        vision={"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [2, 5]},
    ),
    "qwen3_5": Recipe(
        classes=(transformers.Qwen3_5Config, transformers.Qwen3_5ForConditionalGeneration),
        rope=PARTLY,
        text=LINEAR,
        vision=POSITIONS,
    ),
    "qwen3_5_moe": Recipe(
        classes=(transformers.Qwen3_5MoeConfig, transformers.Qwen3_5MoeForConditionalGeneration),
        rope=PARTLY,
        text={**LINEAR, **EXPERTS, **SHARED},
        vision=POSITIONS,
    ),
    "glm4v_moe": Recipe(
        classes=(transformers.Glm4vMoeConfig, transformers.Glm4vMoeForConditionalGeneration),
        rope={"mrope_section": [6, 5, 5], "partial_rotary_factor": 0.5},
        text={**EXPERTS, **GROUPS},
        vision={"patch_size": 14, "image_size": 224},
        outer={"image_token_id": 1, "video_token_id": 2, **MARKS},
    ),
    "qwen3_omni_moe": Recipe(
        classes=(
            transformers.Qwen3OmniMoeThinkerConfig,
            transformers.Qwen3OmniMoeThinkerForConditionalGeneration,
        ),
        text=EXPERTS,
        outer={**IDS, **SOUND},
        audio=AUDIO_TOWER,
    ),
}
SIZES = ("decoder", "vlm", "tiny", *RECIPES)


def recipe(size: str) -> Recipe:
    """That of the family of a size."""
    return RECIPES.get(size, RECIPES["qwen3_vl"])


def library_class(size: str) -> Any:
    """The library's model of a size."""
    return recipe(size).classes[1]


def config(size: str) -> Any:
    """The library's config of a size's model; all share the decoder's shape except `tiny`."""
    own = recipe(size)
    d_model, d_ff, num_layers, vocab = (64, 96, 2, 512) if size == "tiny" else (512, 1536, 4, 16_384)
    text = {
        "vocab_size": vocab,
        "hidden_size": d_model,
        "intermediate_size": d_ff,
        "num_hidden_layers": num_layers,
        "num_attention_heads": d_model // 64,
        "num_key_value_heads": max(1, d_model // 128),
        "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **own.rope},
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        **own.text,
    }
    depth, d_vision = (1, 32) if size in ("decoder", "tiny") else (6, 384)
    vision = {
        "depth": depth,
        "hidden_size": d_vision,
        "intermediate_size": 4 * d_vision,
        "num_heads": max(1, d_vision // 64),
        "out_hidden_size": d_model,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **own.vision,
        **({"deepstack_visual_indexes": [0]} if depth == 1 else {}),
    }
    audio = {} if own.audio is None else {"audio_config": {**own.audio, "output_dim": d_model}}
    return own.classes[0](**own.outer, **audio, text_config=text, vision_config=vision, tie_word_embeddings=False)


def draw_inputs(size: str, shape: str, seed: int, cfg: Any) -> dict[str, Tensor]:
    """What a processor returns for the rows of one batch, padded to the longest, with labels."""
    g = torch.Generator().manual_seed(seed)
    scale = 16 if size == "tiny" else 1
    if shape == "dense":
        lengths = [512 // scale] * 4
    else:
        lengths = [round(64 * (1024 / 64) ** share) // scale for share in torch.rand(8, generator=g).tolist()]
    media = _media(size, len(lengths), cfg, g)
    runs = media.pop("runs", [])
    rows = [_row(length, runs, shape, cfg, g) for length in lengths]
    pad = torch.nn.utils.rnn.pad_sequence
    tokens, labels, kinds = ([row[i] for row in rows] for i in range(3))
    inputs = {
        "input_ids": pad(tokens, batch_first=True),
        "attention_mask": pad([torch.ones_like(x) for x in tokens], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORE),
        **media,
    }
    if recipe(size).audio is None:
        inputs["mm_token_type_ids"] = pad(kinds, batch_first=True)
    return inputs


def _media(size: str, num_rows: int, cfg: Any, g: torch.Generator) -> dict[str, Any]:
    """One image and one clip a row, and under "runs" `(kind, token, its marks, how many)` of each."""
    if size == "decoder":
        return {}
    tower = cfg.vision_config
    side = 4 if size == "tiny" else 224 // tower.patch_size
    values = 3 * tower.temporal_patch_size * tower.patch_size**2
    media: dict[str, Any] = {
        "runs": [(IMAGE, 1, (3, 4), (side // 2) ** 2)],
        "pixel_values": torch.randn(num_rows * side**2, values, generator=g),
        "image_grid_thw": torch.tensor([[1, side, side]] * num_rows),
    }
    if recipe(size).audio is not None:
        media["runs"].append((AUDIO, 7, (8, 9), 13 * FRAMES // 100))
        media["input_features"] = torch.randn(num_rows, MELS, FRAMES, generator=g)
        media["feature_attention_mask"] = torch.ones(num_rows, FRAMES, dtype=torch.int64)
    return media


def _row(
    length: int, runs: list[tuple[int, int, tuple[int, int], int]], shape: str, cfg: Any, g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and kinds: media between marks, then words; all of them or the last third are supervised."""
    length = max(length, sum(count + 2 for *_, count in runs) + 2)
    tokens_T = torch.randint(FIRST_WORD, cfg.text_config.vocab_size, (length,), generator=g)
    kinds_T, place = torch.zeros(length, dtype=torch.int64), 0
    for kind, token, (start, end), count in runs:
        tokens_T[place], tokens_T[place + count + 1] = start, end
        tokens_T[place + 1 : place + 1 + count], kinds_T[place + 1 : place + 1 + count] = token, kind
        place += count + 2
    first = 0 if shape == "dense" else length - math.ceil(length / 3)
    labels_T = torch.where((torch.arange(length) >= first) & (tokens_T >= FIRST_WORD), tokens_T, IGNORE)
    return tokens_T, labels_T, kinds_T
