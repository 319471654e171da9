"""Tiny steps to plan: every family, all kinds of layouts, built as training builds them."""

from dataclasses import replace
from functools import partial
from typing import Any

from mmfn.ops.kernel import wrapping
from mmfn.parallel.context.token_order import segment_multiple
from mmfn.parallel.mesh.layout import Layout, Mesh
from mmfn.parallel.program import Program
from mmfn.train.build.program import build_program
from mmfn.train.config.layout import LayoutSection
from mmfn.train.config.schema import Config
from mmfn.train.optim import HOST_KINDS, adamw, chain, clip_by_global_norm, on_host
from mmfn.train.planning.step_trace import PlannedStep
from mmfn.train.planning.workload import Workload
from tests.tiny import TINY, TRAINED, family, vision_language

TEXT = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
VISION = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 4}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def hf_config(*, moe: bool = False, layers: int = 2, toy: bool = False) -> dict[str, Any]:
    """A config.json, of a model in which products weigh more than in those of `tiny.TINY`; or the toy's."""
    if toy:
        return {"model_type": "toy", "num_layers": layers, "vocab_size": 1000}
    text = {**TEXT, "num_hidden_layers": layers, **(EXPERTS if moe else {})}
    name = "qwen3_vl_moe" if moe else "qwen3_vl"
    return vision_language(name, text=text, vision=VISION, sections=(4, 2, 2), tie_word_embeddings=False)


def make(
    *,
    moe: bool = False,
    toy: bool = False,
    layers: int = 2,
    micro_batches: int = 1,
    side: int = 4,
    trained: str = "all",
    hf: dict[str, Any] | None = None,
    **chosen: Any,
) -> tuple[PlannedStep, Layout]:
    """A step and its layout; `trained`: a name in `TRAINED`, `chosen`: settings of the config's section `layout`.

    `hf`: the config.json of another model.
    """
    hf, section = hf or hf_config(moe=moe, layers=layers, toy=toy), LayoutSection(**chosen)
    found = family(hf["model_type"])
    layout = section.sizes
    config = bare_config().model_copy(update={"layout": section})

    def build(cfg: Any, mesh: Mesh) -> Program:
        program = build_program(config, found, cfg, mesh, TRAINED[trained](found, cfg))
        if section.compute_dtype != "bfloat16" or program.weights.is_head_sharded:
            return program
        # a plan is one of accelerators, whose loss goes through logits; a CPU's does not in bfloat16
        loss = partial(program.ops.linear_cross_entropy, method="logits")
        loss = wrapping(loss, program.ops.linear_cross_entropy)
        return replace(program, ops=replace(program.ops, linear_cross_entropy=loss))

    multiple = segment_multiple(section.kind, layout)
    writer, away = adamw(weight_decay=0.1), set(section.offload) & set(HOST_KINDS)
    setup = PlannedStep(
        family=found,
        cfg=found.config_from_hf(hf),
        build=build,
        optimizer=chain(clip_by_global_norm(0.5), on_host(writer, 4096, what=away) if away else writer),
        workload=Workload(
            tokens=64,
            sample_tokens=32 - 32 % multiple,  # a plan takes all ranks of ep to have as much padding, which is not sent
            image_side=side,
            micro_batches=micro_batches,
            segment_multiple=multiple,
        ),
    )
    return setup, layout


def bare_config() -> Config:
    """A config in which all is by default."""
    return Config.model_validate(
        {
            "model": {"path": ""},
            "data": {"train": "", "token_buckets": [1], "tower_buckets": {"vision": [1]}},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 1},
            "output": {"path": ""},
        }
    )


def _glm() -> dict[str, Any]:
    hf = TINY["glm"](3)
    hf["text_config"] |= {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
    hf["vision_config"] |= {"hidden_size": 32, "out_hidden_size": 64, "patch_size": 4, "image_size": 16}
    return hf


MODELS: dict[str, dict[str, Any]] = {
    **{name: {"hf": hf_config_of(2)} for name, hf_config_of in TINY.items()},
    "dense": {},
    "moe": {"moe": True},
    "glm": {"hf": _glm()},
    "toy": {"toy": True},
}
"""What `make` takes for each model of `tiny.TINY`; of some, a model in which products weigh more."""

BOTH_KEPT = {"remat": "selective", "remat_save": ["experts", "exchange"]}
CASES: dict[str, dict[str, Any]] = {
    "one device": {},
    "remat": {"remat": "full"},
    "selective remat": {"remat": "selective"},
    "uniform remat": {"remat": "uniform", "remat_layers": 2, "layers": 4},
    "block remat": {"remat": "block", "remat_layers": 2, "layers": 3},
    "every 2": {"remat": "full", "remat_every": 2, "layers": 3},
    "remat of the tower": {"remat_stacks": {"vision": {"kind": "full"}}, "remat": "none"},
    "offload": {"offload": ["activations"]},
    "offload, remat, dp": {"offload": ["activations"], "remat": "full", "dp": 2, "layers": 4},
    "frozen tower": {"trained": "decoder"},
    "lora": {"trained": "lora", "moe": True, "micro_batches": 2},
    "lora, remat": {"trained": "lora of all", "remat": "full"},
    "lora, dp, cp": {"trained": "lora", "moe": True, "dp": 2, "cp": 2, "ep": 2, "remat": "full"},
    "dropout": {"trained": "lora with dropout", "micro_batches": 2},
    "dropout, dp, cp, remat": {"trained": "lora with dropout", "dp": 2, "cp": 2, "remat": "full"},
    "frozen blocks, dp": {"trained": "second block", "dp": 2, "remat": "full"},
    "offload optimizer": {"offload": ["optimizer"]},
    "offload both, dp": {"offload": ["activations", "optimizer"], "remat": "full", "dp": 3},
    "offload parameters": {"offload": ["parameters"]},
    "offload parameters, remat": {"offload": ["parameters"], "remat": "full", "layers": 4, "micro_batches": 2},
    "offload parameters, no prefetch": {"offload": ["parameters"], "remat": "full", "prefetch": False, "layers": 3},
    "offload parameters, kept": {"offload": ["parameters"], "remat": "full", "keep_gathered": True},
    "offload parameters, dp": {"offload": ["parameters"], "remat": "full", "dp": 3, "layers": 4},
    "offload parameters, ep": {"offload": ["parameters"], "moe": True, "dp": 2, "ep": 2, "remat": "full"},
    "offload parameters, bfloat16": {"offload": ["parameters"], "compute_dtype": "bfloat16", "remat": "full"},
    "offload parameters, lora": {"offload": ["parameters"], "trained": "lora", "moe": True, "remat": "full"},
    "offload parameters, frozen": {"offload": ["parameters"], "trained": "second block", "dp": 2, "remat": "full"},
    "offload all": {"offload": ["activations", "optimizer", "parameters"], "remat": "full", "layers": 4},
    "offload all, hsdp": {"offload": ["activations", "optimizer", "parameters"], "replicate": 2, "dp": 2},
    "micro-batches": {"micro_batches": 3},
    "text only": {"side": 0},
    "experts": {"moe": True},
    "experts, remat": {"moe": True, "remat": "full"},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "dp": {"dp": 4},
    "dp uneven": {"dp": 3},
    "dp, remat": {"dp": 2, "remat": "full"},
    "dp, kept": {"dp": 2, "remat": "full", "keep_gathered": True},
    "dp, released": {"dp": 2, "reshard_after_forward": True, "layers": 4, "micro_batches": 2},
    "dp, released, offload": {"dp": 2, "reshard_after_forward": True, "offload": ["activations"], "layers": 4},
    "ep, released": {"moe": True, "dp": 2, "ep": 2, "reshard_after_forward": True, "remat": "full", "remat_every": 2},
    "offload parameters, released": {"offload": ["parameters"], "reshard_after_forward": True, "layers": 4},
    "dp, no prefetch": {"dp": 2, "prefetch": False},
    "hsdp": {"replicate": 2, "dp": 2, "micro_batches": 2},
    "gather": {"cp": 2},
    "sharded head": {"dp": 2, "cp": 2, "head": "sharded", "micro_batches": 2},
    "ulysses": {"cp": 2, "kind": "ulysses"},
    "ring": {"cp": 2, "kind": "ring"},
    "ring, dp": {"dp": 2, "cp": 2, "kind": "ring", "remat": "full"},
    "usp": {"cp": 4, "kind": "usp", "ulysses": 2},
    "ep": {"moe": True, "dp": 2, "ep": 2},
    "ep, edp, remat": {"moe": True, "dp": 4, "ep": 2, "remat": "full"},
    "ep, cp": {"moe": True, "dp": 2, "cp": 2, "ep": 4},
    "ep, exchange kept": {"moe": True, "dp": 2, "ep": 2, "remat": "selective", "remat_save": ["exchange"]},
    "capacity": {"moe": True, "dp": 2, "ep": 2, "capacity": 1.5},
    **{name: chosen for name, chosen in MODELS.items() if name not in ("dense", "small", "moe")},
    "omni, ep, cp": {**MODELS["omni"], "dp": 2, "cp": 2, "ep": 2, "remat": "full"},
    "glm, ep, remat": {**MODELS["glm"], "dp": 2, "ep": 2, "remat": "full"},
    "glm, lora, cp": {**MODELS["glm"], "trained": "lora", "cp": 2, "micro_batches": 2},
    "toy, text only": {"toy": True, "side": 0, "micro_batches": 2},
    "toy, hsdp": {"toy": True, "replicate": 2, "dp": 2, "remat": "full"},
    "toy, ring, ep": {"toy": True, "dp": 2, "cp": 2, "ep": 4, "kind": "ring", "remat": "selective"},
    "toy, ulysses, offload": {"toy": True, "cp": 2, "kind": "ulysses", "offload": ["activations"], "layers": 4},
    "toy, offload parameters": {"toy": True, "dp": 2, "offload": ["parameters", "optimizer"], "remat": "full"},
    "toy, dropout": {"toy": True, "trained": "lora with dropout", "remat": "uniform", "remat_layers": 2, "layers": 4},
    "toy, lora, dp": {"toy": True, "trained": "lora", "dp": 3, "micro_batches": 2},
    "toy, sharded head": {"toy": True, "dp": 2, "cp": 2, "head": "sharded"},
    "capacity, exchange kept": {"moe": True, "dp": 4, "ep": 2, "capacity": 1.5, "micro_batches": 2, **BOTH_KEPT},
}
