"""Models of transformers with informative weights, and how each type is called.

The library's own initialisation (std 0.02, zero biases) hides errors, so weights are drawn by fan-in and biases and
norms are moved off their defaults.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmfn.train.evidence.float64 import float64
from tests.oracles.conversations import groups, is_heard_and_seen
from tests.oracles.recipes import RECIPES, model_type

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

RTOL, ATOL = 1e-4, 2e-5  # float32 against float32 in another order of summation
WIDER = {"qwen3_5": 1e-3, "qwen3_5_moe": 1e-3}  # keys are divided by their length, which may be small


def narrow_atol(family: str) -> float:
    """The absolute tolerance in float32 of a model type."""
    return WIDER.get(family, ATOL)


def oracle_class(cfg: Any) -> Any:
    """The class of transformers that a config is for."""
    return RECIPES[model_type(cfg)].classes[1]


def build(cfg: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers with informative weights, its plain attention and experts, in eval mode.

    One in float64 has its tables in float64 too, and is to be called inside `mmfn.train.evidence.float64.float64()`.
    """
    torch.manual_seed(seed)
    with float64() if dtype == torch.float64 else nullcontext():
        model = oracle_class(cfg)._from_config(cfg, dtype=dtype, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g, dtype=dtype)
            if name.endswith("A_log"):
                p.copy_(0.5 * noise - 1)  # states of the delta rule that last for several tokens
            elif p.ndim == 1:
                p.add_(0.1 * noise)
            else:
                fan_in = p.shape[2] if p.ndim == 3 else p[0].numel()  # three dims: one matrix per expert
                p.copy_(noise * fan_in**-0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # float32 in checkpoints whatever the rest is
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=g))
    return model


def arguments(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What a call of the model is given for inputs as a processor returns them.

    Three types want more than these: explicit positions, a flag, and frames in the place of images.
    """
    name = model_type(model.config)
    if name == "qwen3_omni_moe":
        return {**inputs, "use_audio_in_video": is_heard_and_seen(inputs)}
    if name == "qwen2_5_vl":
        return {**inputs, "position_ids": block_positions(model.config, inputs)}
    if name == "glm4v_moe" and {"pixel_values", "pixel_values_videos"} <= inputs.keys():
        return frames_as_images(inputs)
    return inputs


def run(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
    """The output of the model; in the dtype of its weights also where modules cast to float32."""
    is_wide = model.dtype == torch.float64
    cast = {k: v.to(model.dtype) if v.is_floating_point() and "second" not in k else v for k, v in inputs.items()}
    with float64() if is_wide else nullcontext():
        return model(**(arguments(model, cast if is_wide else inputs)), use_cache=False, **kwargs)


def real_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits of all real tokens, row after row."""
    logits: Tensor = run(model, inputs).logits
    return logits[inputs["attention_mask"].bool()]


def positions(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[3, rows, columns]: positions of what a call reads, by the library where its rule is right."""
    kwargs = arguments(model, inputs)
    if "position_ids" in kwargs:
        return kwargs["position_ids"]
    mask = inputs["attention_mask"]
    if model_type(model.config) == "qwen3_omni_moe":
        lengths = kwargs["feature_attention_mask"].sum(1) if "feature_attention_mask" in kwargs else None
        grids = [kwargs.get(f"{kind}_grid_thw") for kind in ("image", "video")]
        places, _ = model.model.get_rope_index(
            kwargs["input_ids"],
            *grids,
            mask,
            kwargs["use_audio_in_video"],
            lengths,
            kwargs.get("video_second_per_grid"),
        )
        return places
    kinds = kwargs["mm_token_type_ids"]
    grids = {key: kwargs.get(key) for key in ("image_grid_thw", "video_grid_thw")}
    places, _ = model.model.get_rope_index(kwargs["input_ids"], kinds, attention_mask=mask, **grids)
    return places


def block_positions(cfg: Any, inputs: dict[str, Tensor]) -> Tensor:
    """int64[3, rows, columns]: Qwen2.5-VL's positions as its weights were trained with, a block behind all before it.

    transformers 5.23 lets the text after a video start at the video's start + max(height, width), below the video's
    own positions in time, where earlier versions and the original code begin behind the largest of them.
    """
    vision = cfg.vision_config
    merge, places = vision.spatial_merge_size, torch.zeros(3, *inputs["input_ids"].shape, dtype=torch.int64)
    grids = {kind: iter(inputs.get(f"{name}_grid_thw", ())) for kind, name in ((1, "image"), (2, "video"))}
    seconds = iter(inputs.get("second_per_grid_ts", ()))
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        blocks, start = [], 0
        for kind, length in groups(inputs["mm_token_type_ids"][row][mask]):
            if kind == 0:
                block = torch.arange(length).expand(3, -1)
            else:
                t, h, w = (int(n) for n in next(grids[kind]))
                rate = vision.tokens_per_second * float(next(seconds)) if kind == 2 else 1.0
                axes = [
                    (torch.arange(t, dtype=torch.float32) * rate).long(),
                    torch.arange(h // merge),
                    torch.arange(w // merge),
                ]
                block = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])
            blocks.append(block + start)
            start = int(blocks[-1].max()) + 1
        places[:, row, mask] = torch.cat(blocks, 1)
    return places


def frames_as_images(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Images and videos of GLM-4.5V as images alone, in reading order; the library refuses a call with both.

    Its frames are images in all but name: each is encoded by itself, stands for one image token per feature and takes
    the positions of an image.
    """
    images, frames = [], []
    for kind, out in (("image", images), ("video", frames)):
        pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
        for t, h, w in inputs[f"{kind}_grid_thw"].tolist():
            for _ in range(t):
                out.append((pixels[: h * w], [1, h, w]))
                pixels = pixels[h * w :]
    sources, order = {1: iter(images), 2: iter(frames)}, []
    for kinds, mask in zip(inputs["mm_token_type_ids"], inputs["attention_mask"].bool(), strict=True):
        order += [next(sources[kind]) for kind, _ in groups(kinds[mask]) if kind]
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    return {
        **text,
        **({"labels": inputs["labels"]} if "labels" in inputs else {}),
        "mm_token_type_ids": inputs["mm_token_type_ids"].clamp(max=1),
        "pixel_values": torch.cat([pixels for pixels, _ in order]),
        "image_grid_thw": torch.tensor([grid for _, grid in order]),
    }


def save(model: Any, folder: Path, **kwargs: Any) -> Path:
    """Write the model as transformers does; a thinker as a part of the whole model that it is published in."""
    model.save_pretrained(folder, **kwargs)
    if model_type(model.config) == "qwen3_omni_moe":
        _embed_thinker(model.config, folder)
    return folder


def to_dict(cfg: Any) -> dict[str, Any]:
    """The config.json of a published model: that of a thinker is a part of the whole model's."""
    if model_type(cfg) != "qwen3_omni_moe":
        return cfg.to_dict()
    whole = {"architectures": ["Qwen3OmniMoeForConditionalGeneration"], "model_type": "qwen3_omni_moe"}
    return {**whole, "thinker_config": cfg.to_dict()}


def _embed_thinker(cfg: Any, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(to_dict(cfg)), encoding="utf-8")
    for path in folder.glob("*.safetensors"):
        tensors = {f"thinker.{name}": tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    if (path := folder / "model.safetensors.index.json").exists():
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {f"thinker.{name}": file for name, file in index["weight_map"].items()}
        path.write_text(json.dumps(index), encoding="utf-8")
