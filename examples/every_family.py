"""A tiny model of any family with data for it: what the cards of docs/evidence verify, made offline in seconds.

    python examples/every_family.py OUT FAMILY

writes `model/`, a checkpoint that transformers itself has written, of the architecture of a published model, every
setting of its config.json as published but for its sizes, with random weights; and 384 questions to train on with 48
held-out ones (`train.json`, `eval.json`): the colour of noisy squares and, of a model that hears, the pitch of noisy
tones. Images and sound are synthetic. Running it again writes the same data and weights.
"""

import argparse
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from digits import make_tokenizer, write_json
from dtmf import RATE, write_wav
from PIL import Image

from mmfn.models import family
from mmfn.models.data.chat import read_template

PUBLISHED = {  # name on the command line -> folder in configs/models
    "qwen3_vl": "Qwen3-VL-2B",
    "qwen3_vl_moe": "Qwen3-VL-30B-A3B",
    "qwen2_5_vl": "Qwen2.5-VL-3B",
    "qwen3_5": "Qwen3.5-0.8B",
    "qwen3_5_moe": "Qwen3.5-35B-A3B",
    "qwen3_omni": "Qwen3-Omni-30B-A3B",
    "glm4v_moe": "GLM-4.5V",
}
MODELS = Path(__file__).parents[1] / "configs" / "models"
NUM = {"train": 384, "eval": 48}
SIDE, PATCH, MERGE = 24, 4, 2  # pixels of an image and of a patch; patches of a token
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (225, 210, 40)}
HERTZ = {"low": 300, "middle": 900, "high": 2700}

WIDTH, HEAD, TOWER_WIDTH = 64, 32, 32
SIZES: dict[str, dict[str, Any]] = {  # in place of the published ones, wherever a section has the key
    "text": {
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD,
        "max_position_embeddings": 1024,
        "num_experts": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
        "full_attention_interval": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "vision": {
        "depth": 2,
        "hidden_size": TOWER_WIDTH,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": PATCH,
        "image_size": SIDE,
        "num_position_embeddings": (SIDE // PATCH) ** 2,
        "out_hidden_size": WIDTH,
        "window_size": 2 * PATCH * MERGE,
        "fullatt_block_indexes": [1],
    },
    "audio": {
        "d_model": TOWER_WIDTH,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "downsample_hidden_size": 8,
        "max_source_positions": 64,
        "output_dim": WIDTH,
    },
}


def write_demo(out: Path, name: str) -> None:
    """Write the model folder and both datasets of a family under `out`, which is created."""
    config = tiny_config(name)
    write_model(out / "model", config)
    write_dataset(out, has_sound="audio_config" in config)


# ---- the model


def tiny_config(name: str) -> dict[str, Any]:
    """The published config.json with the sizes of `SIZES`; of a model with several parts that of its thinker."""
    config: dict[str, Any] = json.loads((MODELS / PUBLISHED[name] / "config.json").read_text(encoding="utf-8"))
    if "thinker_config" in config:
        thinker = config["architectures"][0].replace("ForConditional", "ThinkerForConditional")
        config = {**config["thinker_config"], "architectures": [thinker]}
    for part, sizes in SIZES.items():
        section = config.get(f"{part}_config", config if part == "text" else {})
        section.update({key: size for key, size in sizes.items() if key in section})
        section.update({"dtype": "float32"} if "dtype" in section else {})
        if section.get("deepstack_visual_indexes"):
            section["deepstack_visual_indexes"] = [0]
    _set_rope_sections(config.get("text_config", config))
    return config


def _set_rope_sections(text: dict[str, Any]) -> None:
    rope = text.get("rope_parameters") or text["rope_scaling"]
    head = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
    part = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0))
    half = int(head * part) // 2
    rope["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]


def write_model(out: Path, config: dict[str, Any]) -> None:
    """Tokenizer, processor and, by transformers, config and weights."""
    out.mkdir(parents=True, exist_ok=True)
    chat = family(config["model_type"]).data.chat
    marks, template = chat.marks, chat.templates[0]
    assert marks is not None
    special = tuple(dict.fromkeys([*marks.stops, *marks.tokens, *chat.tokens.values()]))
    tokenizer = make_tokenizer(special, read_template(template), end=marks.stops[0])
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in chat.tokens.items() if key in config}
    stops = {"eos_token_id": tokenizer.convert_tokens_to_ids(list(marks.stops)), "pad_token_id": tokenizer.pad_token_id}
    text = config.get("text_config", config)
    text.update({"vocab_size": len(tokenizer), **{key: stops[key] for key in stops if key in text}})
    text.pop("bos_token_id", None)  # which no chat has
    write_json(out / "config.json", {**config, **ids})
    read = transformers.AutoConfig.from_pretrained(out)
    model = getattr(transformers, config["architectures"][0])._from_config(read, dtype=torch.float32)
    draw_weights(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_json(out / "generation_config.json", {"do_sample": False, **stops})
    pixels = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE}
    image = {"size": {"shortest_edge": 64, "longest_edge": 4096}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    sound = {"feature_size": 128, "sampling_rate": RATE, "hop_length": 160, "n_fft": 400}
    write_json(out / "preprocessor_config.json", {**pixels, **image, **(sound if "audio_config" in config else {})})


@torch.no_grad()
def draw_weights(model: Any) -> None:
    """Weights by their fan-in, biases and norms off their defaults: none of them is without effect on the logits."""
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if name.endswith("A_log"):
            p.copy_(0.5 * noise - 1)  # states of the delta rule that last for several tokens
        elif p.ndim == 1:
            p.add_(0.1 * noise)
        else:
            p.copy_(noise * (p.shape[2] if p.ndim == 3 else p[0].numel()) ** -0.5)  # 3 dims: a matrix per expert
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=g))


# ---- the data


def write_dataset(out: Path, *, has_sound: bool) -> None:
    """PNG and WAV files, and two lists of conversations; of a model that hears every third question is about a tone."""
    draws, order = np.random.default_rng(0), random.Random(0)
    for split, num in NUM.items():
        (out / split).mkdir(parents=True, exist_ok=True)
        entries = []
        for index in range(num):
            is_heard = has_sound and index % 3 == 0
            answer = order.choice(list(HERTZ if is_heard else COLOURS))
            file = f"{split}/{index:04d}.{'wav' if is_heard else 'png'}"
            if is_heard:
                write_wav(out / file, tone(HERTZ[answer], draws))
            else:
                Image.fromarray(square(COLOURS[answer], draws)).save(out / file)
            question = "<audio>Which pitch?" if is_heard else "<image>Which colour?"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            media: Mapping[str, list[str]] = {"audios" if is_heard else "images": [file]}
            entries.append({"id": f"{split}-{index:04d}", "messages": messages, **media})
        write_json(out / f"{split}.json", entries)


def square(colour: tuple[int, int, int], draws: np.random.Generator) -> Any:
    """uint8[SIDE, SIDE, 3]: a square of noisy colour somewhere on noisy grey."""
    pixels = draws.normal(120, 20, (SIDE, SIDE, 3))
    size = int(draws.integers(10, 18))
    row, column = draws.integers(0, SIDE - size, 2)
    pixels[row : row + size, column : column + size] = colour + draws.normal(0, 20, (size, size, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def tone(hertz: float, draws: np.random.Generator) -> Any:
    """float64[RATE]: a second of a tone of about that pitch, under noise.

    Of less than a second transformers' audio tower makes something else than beside a longer clip.
    """
    times = np.arange(RATE) / RATE
    wave = np.sin(2 * np.pi * (hertz * draws.uniform(0.9, 1.1) * times + draws.uniform()))
    return (draws.uniform(0.3, 0.8) * wave + draws.normal(0, 0.05, times.shape)).clip(-1, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path, help="folder to write, for example build/evidence/qwen3_vl")
    parser.add_argument("family", choices=PUBLISHED, help="whose architecture")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        write_demo(args.out, args.family)
    except OSError as error:
        sys.exit(f"every_family.py: error: cannot write {str(args.out)!r} ({error}); give a folder that can be written")
    print(f"data: {args.out / 'train.json'}, {args.out / 'eval.json'}; model: {args.out / 'model'}")
