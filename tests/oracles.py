"""Tiny random models of transformers, and inputs for them: the oracle of many tests.

The library's own initialisation (std 0.02, zero biases) hides errors, so weights are drawn by fan-in and biases and
norms are moved off their defaults.
"""

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.tiny import FIRST_WORD, vision_language

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

CLASSES = {
    "qwen3_vl": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe": (transformers.Qwen3VLMoeConfig, transformers.Qwen3VLMoeForConditionalGeneration),
}
OWN = {"qwen3_vl": {}, "qwen3_vl_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 22}}
PAD_ID, IMAGE_ID, VIDEO_ID, START_ID, END_ID = range(FIRST_WORD)
RTOL, ATOL = 1e-4, 2e-5  # float32 against float32 in another order of summation


def config(
    *,
    family: str = "qwen3_vl",
    sections: tuple[int, int, int] = (4, 2, 2),
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **outer: Any,
) -> Any:
    """A tiny config of a family (`tiny.vision_language`); `text`, `vision` and keywords override its values."""
    text_values = {
        "vocab_size": 97,
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": None,
        "eos_token_id": None,
        **OWN[family],
        **(text or {}),
    }
    vision_values = {"hidden_size": 24, "intermediate_size": 40, "patch_size": 3, "temporal_patch_size": 2}
    ids = {"vision_start_token_id": START_ID, "vision_end_token_id": END_ID}
    values = vision_language(
        family,
        text=text_values,
        vision=vision_values | (vision or {}),
        sections=sections,
        **({"tie_word_embeddings": True} | ids | outer),
    )
    del values["model_type"]
    return CLASSES[family][0](**values)


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
    is_tied = r.random() < 0.5
    if family == "qwen3_vl_moe":
        num_layers = text["num_hidden_layers"]
        text |= {
            "num_experts": r.randint(4, 16),
            "num_experts_per_tok": r.randint(1, 4),
            "moe_intermediate_size": r.choice([3, 8, 13, 20]),
            "decoder_sparse_step": r.choice([1, 1, 2]) if num_layers > 1 else 1,
            "mlp_only_layers": r.choice([[], [], [0]]) if num_layers > 1 else [],
            "router_aux_loss_coef": r.choice([0.001, 0.1]),
        }
    return config(family=family, sections=sections, text=text, vision=vision, tie_word_embeddings=is_tied)


def oracle_class(cfg: Any) -> Any:
    """The class of transformers that a config is for."""
    return CLASSES[cfg.model_type][1]


def build(cfg: Any, seed: int = 0) -> Any:
    """A model of transformers with informative float32 weights, its plain attention and experts, in eval mode."""
    torch.manual_seed(seed)
    model = oracle_class(cfg)._from_config(cfg, dtype=torch.float32, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
            else:
                fan_in = p.shape[2] if p.ndim == 3 else p[0].numel()  # three dims: one matrix per expert
                p.copy_(torch.randn(p.shape, generator=g) * fan_in**-0.5)
    return model


def inputs(cfg: Any, seed: int, *, rows: int = 2, pad: str = "right", **limits: Any) -> dict[str, Tensor]:
    """What a processor returns for `rows` random conversations: text, images and videos in any order.

    `limits`: `images`, `videos`: the most of a kind in one row.
    """
    r = random.Random(f"inputs {seed}")
    built = [_row(cfg, r, **limits) for _ in range(rows)]
    longest = max(len(ids) for ids, _, _ in built)
    out = {
        key: torch.zeros(rows, longest, dtype=torch.int64)
        for key in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    for i, (ids, kinds, _) in enumerate(built):
        place = slice(0, len(ids)) if pad == "right" else slice(longest - len(ids), longest)
        for key, value in (("input_ids", ids), ("mm_token_type_ids", kinds), ("attention_mask", [1] * len(ids))):
            out[key][i, place] = torch.tensor(value)
    g = torch.Generator().manual_seed(seed)
    v = cfg.vision_config
    width = v.in_channels * v.temporal_patch_size * v.patch_size**2
    for kind, pixels, grids in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
        if found := [grid for _, _, media in built for k, grid in media if k == kind]:
            out[grids] = torch.tensor(found)
            out[pixels] = torch.randn(int(out[grids].prod(-1).sum()), width, generator=g)
    return out


def _row(
    cfg: Any, r: random.Random, images: int = 2, videos: int = 1
) -> tuple[list[int], list[int], list[tuple[int, tuple[int, int, int]]]]:
    """Token ids, their kinds, and (kind, grid) of the media of one row."""
    merge = cfg.vision_config.spatial_merge_size

    def words(least: int, most: int) -> list[int]:
        return [r.randrange(FIRST_WORD, cfg.text_config.vocab_size) for _ in range(r.randint(least, most))]

    ids, media = words(1, 6), []
    kinds = [0] * len(ids)
    todo = [1] * r.randint(0, images) + [2] * r.randint(0, videos)
    r.shuffle(todo)
    for kind in todo:
        t, rows, columns = (1 if kind == 1 else r.randint(1, 3)), r.randint(1, 4), r.randint(1, 4)
        media.append((kind, (t, rows * merge, columns * merge)))
        for _ in range(t):
            text = words(0, 3)
            ids += [*text, START_ID, *[IMAGE_ID if kind == 1 else VIDEO_ID] * (rows * columns), END_ID]
            kinds += [0] * len(text) + [0, *[kind] * (rows * columns), 0]
    tail = words(1, 7)
    return ids + tail, kinds + [0] * len(tail), media


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every row of padded inputs alone, without padding."""
    out, taken = [], {"image_grid_thw": 0, "video_grid_thw": 0}
    for i, mask in enumerate(batch["attention_mask"].bool()):
        row = {key: batch[key][i][mask][None] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
        for kind, pixels, grids in (
            (1, "pixel_values", "image_grid_thw"),
            (2, "pixel_values_videos", "video_grid_thw"),
        ):
            # Every frame is one run of its kind, so the grids used so far tell which ones are this row's.
            runs = torch.unique_consecutive(row["mm_token_type_ids"][0])
            left, mine = int((runs == kind).sum()), []
            while left > 0:
                grid = batch[grids][taken[grids] + len(mine)]
                mine.append(grid)
                left -= int(grid[0])
            if mine:
                start = int(batch[grids][: taken[grids]].prod(-1).sum())
                row[grids] = torch.stack(mine)
                row[pixels] = batch[pixels][start : start + int(row[grids].prod(-1).sum())]
                taken[grids] += len(mine)
        out.append(row)
    return out


def real_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The model's logits of all real tokens, row after row."""
    logits: Tensor = model(**batch, use_cache=False).logits
    return logits[batch["attention_mask"].bool()]


def save(model: Any, folder: Path, **kwargs: Any) -> Path:
    """Write the model as transformers does."""
    model.save_pretrained(folder, **kwargs)
    return folder
