"""Writes the ready configs, one for each published size, device and way to train: `configs/generate.py [MODEL ...]`.

A row of `SIZES` says on how many ranks, and how many share the experts; the batch, what is computed again and what lies
on the host are chosen by the search of `mmfn suggest`, from nothing but `configs/models/MODEL/config.json`. The head of
each file says what its plan expects; tests/train/test_ready_configs.py plans it again. With `--refresh`, which is what
`make configs` runs, what was chosen stays, planned and written again: after a change of what plans say, or of defaults.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from mmfn.errors import UserError
from mmfn.train.build.model import find_family
from mmfn.train.config.load import Settings, load_config
from mmfn.train.config.schema import ModelSection
from mmfn.train.planning.choice import Budget, Choice, Space
from mmfn.train.planning.config_text import config_text
from mmfn.train.planning.suggest import Measures, suggest

CONFIGS = Path(__file__).parent
DEVICES = {"910b": "npu", "a3": "npu", "h100": "cuda"}  # device -> kind of torch device
TOKENS = (
    16_384,
    8192,
    4096,
)  # of a rank's batch, the first with which something fits; half of them are of images (and of sound)
SAMPLE_TOKENS = 2048  # a usual length, by which attention is planned
PIXELS = 1024 * 1024  # of an image, at most: 1,024 tokens where one stands for 32 x 32


@dataclass(frozen=True, kw_only=True)
class Size:
    """A published size: its family and name in `configs/`, its checkpoint, and ranks to train it in full and by LoRA.

    `ep`: how many of the ranks share the experts.
    """

    family: str
    name: str
    model: str
    suffix: str = ""
    world: int = 8
    lora_world: int = 8
    ep: int = 1


SIZES = (
    Size(family="qwen3_vl", name="2b", model="Qwen3-VL-2B", suffix="-Instruct"),
    Size(family="qwen3_vl", name="4b", model="Qwen3-VL-4B", suffix="-Instruct"),
    Size(family="qwen3_vl", name="8b", model="Qwen3-VL-8B", suffix="-Instruct"),
    Size(family="qwen3_vl", name="32b", model="Qwen3-VL-32B", suffix="-Instruct", world=16),
    Size(family="qwen3_vl", name="30b-a3b", model="Qwen3-VL-30B-A3B", suffix="-Instruct", world=16, ep=8),
    Size(
        family="qwen3_vl",
        name="235b-a22b",
        model="Qwen3-VL-235B-A22B",
        suffix="-Instruct",
        world=128,
        lora_world=32,
        ep=8,
    ),
    Size(family="qwen2_5_vl", name="3b", model="Qwen2.5-VL-3B", suffix="-Instruct"),
    Size(family="qwen2_5_vl", name="7b", model="Qwen2.5-VL-7B", suffix="-Instruct"),
    Size(family="qwen2_5_vl", name="32b", model="Qwen2.5-VL-32B", suffix="-Instruct", world=16),
    Size(family="qwen2_5_vl", name="72b", model="Qwen2.5-VL-72B", suffix="-Instruct", world=32),
    Size(family="qwen3_5", name="0.8b", model="Qwen3.5-0.8B"),
    Size(family="qwen3_5", name="2b", model="Qwen3.5-2B"),
    Size(family="qwen3_5", name="4b", model="Qwen3.5-4B"),
    Size(family="qwen3_5", name="9b", model="Qwen3.5-9B"),
    Size(family="qwen3_5", name="27b", model="Qwen3.5-27B", world=16),
    Size(family="qwen3_5", name="35b-a3b", model="Qwen3.5-35B-A3B", world=16, ep=8),
    Size(family="qwen3_5", name="122b-a10b", model="Qwen3.5-122B-A10B", world=64, lora_world=16, ep=8),
    Size(family="qwen3_5", name="397b-a17b", model="Qwen3.5-397B-A17B", world=256, lora_world=32, ep=8),
    Size(family="qwen3_omni", name="30b-a3b", model="Qwen3-Omni-30B-A3B", suffix="-Instruct", world=16, ep=8),
    Size(family="glm4_5v", name="106b-a12b", model="GLM-4.5V", world=64, lora_world=16, ep=8),
)


def path_of(size: Size, device_name: str, *, is_lora: bool) -> Path:
    """Where the config of a size stands."""
    world = size.lora_world if is_lora else size.world
    return CONFIGS / size.family / f"{size.name}{'-lora' * is_lora}-{device_name}x{world}.yaml"


def settings_of(size: Size, device_name: str, *, is_lora: bool) -> dict[str, Mapping[str, Any]]:
    """What is not chosen; the model is that of `configs/models`, whose place is another in the file."""
    kind = DEVICES[device_name]
    return {
        "model": {"path": str(CONFIGS / "models" / size.model), "dtype": "bfloat16", "device": kind},
        "data": {"train": "data/train.json", "image_max_pixels": PIXELS, "workers": 4},
        "optimizer": {"lr": 1e-4 if is_lora else 1e-5, "betas": [0.9, 0.95]},
        "schedule": {"warmup_steps": 50, "final_scale": 0.1},
        **({"lora": {"rank": 16, "alpha": 32}} if is_lora else {}),
        "train": {"steps": 1000},
        "checkpoint": {"every": 200},
        "output": {"path": f"runs/{size.model.lower()}{'-lora' * is_lora}"},
    }


def choose(size: Size, device_name: str, measures: Measures, *, is_lora: bool) -> Choice:
    """The best choice of the largest batch that fits. Raises ValueError where none does."""
    values = settings_of(size, device_name, is_lora=is_lora)
    layout = {"replicate": 1, "cp": 1, "ep": size.ep}
    family, cfg = find_family(ModelSection(path=values["model"]["path"]))
    reason: UserError | None = None
    moved: tuple[dict[str, Any], ...] = ({"offload": []}, {})  # first with nothing on the host
    for tokens, own in product(TOKENS, moved):
        kinds = family.towers(cfg).items()
        towers = {name: tokens // 2 // kind.features * kind.inputs for name, kind in kinds}
        space = Space(
            settings=Settings(values={**values, "layout": {**layout, **own}}, path=CONFIGS, origins={}),
            world=size.lora_world if is_lora else size.world,
            device=device_name,
            budgets=[Budget(tokens=tokens, towers=towers)],
        )
        try:
            return suggest(space, lambda config, _: measures.plan(config, device_name))[0]
        except UserError as error:
            reason = error
    raise UserError(f"{size.model} on {device_name}: {reason}")


def text_of(size: Size, choice: Choice, path: Path) -> str:
    """The file: a choice whose model is where a user has it."""
    others = " (or -Thinking)" if size.family == "qwen3_vl" else ""
    how = "low-rank adapters" if choice.config.has_adapters else "all parameters"
    head = [
        "yaml-language-server: $schema=../schema.json",
        f"{size.model}{size.suffix}{others}, {how}, on {choice.config.layout.world} x {choice.plan.device}: written by "
        "configs/generate.py.",
        f"Samples of about {SAMPLE_TOKENS:,} tokens, half of them of images; mmfn suggest chooses by data of your own.",
    ]
    moved = choice.config.model.model_copy(update={"path": f"checkpoints/{size.model}{size.suffix}"})
    shown = Choice(config=choice.config.model_copy(update={"model": moved}), plan=choice.plan, fill=choice.fill)
    return config_text(head, shown, str(path.relative_to(CONFIGS.parent)))


def refresh(size: Size, device_name: str, measures: Measures, *, is_lora: bool) -> Choice:
    """What the file of a size has chosen, planned as it is now."""
    path = path_of(size, device_name, is_lora=is_lora)
    config = load_config(path, [f"model.path={CONFIGS / 'models' / size.model}"]).config
    return Choice(config=config, plan=measures.plan(config, device_name), fill=1.0)


def main(names: Collection[str], make: Callable[..., Choice]) -> Iterator[Path]:
    """Write the configs of the models that are named, or of all. `make`: `choose` or `refresh`."""
    for size in SIZES:
        if names and size.model not in names:
            continue
        for is_lora in (False, True):
            measures = Measures(SAMPLE_TOKENS)
            for device_name in DEVICES:
                path = path_of(size, device_name, is_lora=is_lora)
                choice = make(size, device_name, measures, is_lora=is_lora)
                path.parent.mkdir(exist_ok=True)
                path.write_text(text_of(size, choice, path), encoding="utf-8")
                yield path


if __name__ == "__main__":
    is_refresh = "--refresh" in sys.argv
    for written in main(set(sys.argv[1:]) - {"--refresh"}, refresh if is_refresh else choose):
        print(written, flush=True)
