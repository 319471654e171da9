"""A small model as data, in three generations of names; a checkpoint of each is written by hand, not by the key map."""

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmfn.models.keymap import Entry, KeyMap
from mmfn.spec import ZEROS, ParamSpec, normal, spec

E, F, D, LAYERS = 3, 4, 6, 2
KERNEL = (2, 3, 2, 2)  # channels, frames, rows, columns

BLOCK = {
    "experts": {
        "gate_up": spec((E, 2 * F, D), "experts mlp embed", normal(1.0), parts=2),
        "down": spec((E, D, F), "experts embed mlp", normal(1.0)),
    },
    "qkv": {"weight": spec((10, D), "heads embed", normal(1.0))},
    "router": {
        "weight": spec((E, D), "router embed", normal(1.0)),
        "bias": ParamSpec(
            shape=(E,), axes=("router",), init=ZEROS, dtype=torch.float32, is_frozen=True, rule="balance"
        ),
    },
}
SPECS = {
    "layers": [BLOCK] * LAYERS,
    "patches": {"weight": spec((D, 24), "embed tower_inputs", normal(1.0))},
    "scale": spec((), "", ZEROS),
}

NUMBERED = "layers.{i}.mlp.experts.{e}."
HUB = (
    Entry(
        path="layers/{i}/experts/gate_up",
        name=(NUMBERED + "gate_proj.weight", NUMBERED + "up_proj.weight"),
        join=1,
    ),
    Entry(path="layers/{i}/experts/down", name=NUMBERED + "down_proj.weight"),
)
FUSED = (
    Entry(path="layers/{i}/experts/gate_up", name="layers.{i}.mlp.experts.gate_up_proj"),
    Entry(path="layers/{i}/experts/down", name="layers.{i}.mlp.experts.down_proj"),
)
OLDER = (  # one matrix [in, out] per expert
    Entry(path="layers/{i}/experts/gate_up", name="h.{i}.moe.{e}.w1", dims=(0, 2, 1)),
    Entry(path="layers/{i}/experts/down", name="h.{i}.moe.{e}.w2", dims=(0, 2, 1)),
)
KEY_MAP = KeyMap(
    entries=(
        Entry(
            path="layers/{i}/qkv/weight",
            name=tuple(f"layers.{{i}}.attn.{n}_proj.weight" for n in "qkv"),
            sizes=(6, 2, 2),
        ),
        Entry(path="layers/{i}/router/weight", name="layers.{i}.mlp.gate.weight"),
        Entry(path="layers/{i}/router/bias", name="layers.{i}.mlp.gate.e_score_correction_bias"),
        Entry(path="patches/weight", name="patch_embed.proj.weight", disk_shape=(D, *KERNEL)),
        Entry(path="scale", name="scale"),
    ),
    architecture="Toy",
    layouts={"hub": HUB, "transformers": FUSED, "older": OLDER},
    verbatim=(r"mtp\..*", r"talker\..*"),
)


def by_hand(params, layout: str) -> dict[str, Tensor]:
    """What a checkpoint of a layout holds."""
    out = {"patch_embed.proj.weight": params["patches"]["weight"].view(D, *KERNEL), "scale": params["scale"]}
    for i, block in enumerate(params["layers"]):
        q, k, v = block["qkv"]["weight"].split((6, 2, 2))
        out |= {f"layers.{i}.attn.{n}_proj.weight": x for n, x in (("q", q), ("k", k), ("v", v))}
        out[f"layers.{i}.mlp.gate.weight"] = block["router"]["weight"]
        out[f"layers.{i}.mlp.gate.e_score_correction_bias"] = block["router"]["bias"]
        gate_up, down = block["experts"]["gate_up"], block["experts"]["down"]
        if layout == "transformers":
            out |= {
                f"layers.{i}.mlp.experts.gate_up_proj": gate_up,
                f"layers.{i}.mlp.experts.down_proj": down,
            }
        for e in range(E):
            if layout == "hub":
                out[f"layers.{i}.mlp.experts.{e}.gate_proj.weight"] = gate_up[e, :F]
                out[f"layers.{i}.mlp.experts.{e}.up_proj.weight"] = gate_up[e, F:]
                out[f"layers.{i}.mlp.experts.{e}.down_proj.weight"] = down[e]
            if layout == "older":
                out |= {f"h.{i}.moe.{e}.w1": gate_up[e].T, f"h.{i}.moe.{e}.w2": down[e].T}
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in out.items()}


def write(folder, params, layout: str, **more: Tensor) -> None:
    """A checkpoint of a layout in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(by_hand(params, layout) | more, folder / "model.safetensors", metadata={"format": "pt"})
