"""Writes names.json beside this file: name and shape of every tensor of every published checkpoint.

    python tests/goldens/make_name_goldens.py

The models of `configs/models` are built by transformers 5.23.0 without memory, and the names of the library's modules
turned into those of the published files by the rules below. A line stands for many tensors: each `{0..2,5}` takes each
of these numbers.

    "model.layers.{0..27}.mlp.experts.{0..7}.up_proj.weight": [768, 2048]
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[2]
MODELS, PAGE = ROOT / "configs" / "models", Path(__file__).with_name("names.json")
Shapes = dict[str, tuple[int, ...]]

PREFIXES = {  # model_type -> beginnings in the library and in the file; the first that fits
    "qwen2_5_vl": (("model.visual.", "visual."), ("model.language_model.", "model.")),
    "qwen3_omni_moe": (
        ("thinker.model.language_model.", "thinker.model."),
        ("thinker.model.", "thinker."),
    ),
}
EXPERTS = {  # model_type -> how the file stores the library's [E, 2F, D] and [E, D, F]
    "qwen3_vl_moe": "transposed",
    "qwen3_5_moe": "fused",
    "qwen3_omni_moe": "one by one",
    "glm4v_moe": "one by one",
}
WITH_MTP = ("qwen3_5", "qwen3_5_moe")  # its experts are stored one by one


def sizes() -> dict[str, dict[str, Any]]:
    """The config.json of every published size, by name."""
    files = sorted(MODELS.glob("*/config.json"))
    return {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


def tensors(hf: Mapping[str, Any]) -> Shapes:
    """{name: shape} of the published file of a config."""
    model_type = hf["model_type"]
    cls = getattr(transformers, hf["architectures"][0])
    with torch.device("meta"):
        model = cls._from_config(cls.config_class.from_dict(hf))
    inside = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if hf.get("tie_word_embeddings"):
        del inside["lm_head.weight"]
    shapes = dict(_experts(inside, EXPERTS.get(model_type, "fused")))
    if model_type in WITH_MTP:
        shapes |= _experts(_mtp(inside, hf["text_config"]), "one by one")
    return {_stored_name(name, PREFIXES.get(model_type, ())): shape for name, shape in shapes.items()}


def _stored_name(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _experts(inside: Shapes, form: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in inside.items():
        layer, _, leaf = name.rpartition(".")
        if not layer.endswith(".experts") or form == "fused":
            yield name, shape
        elif form == "transposed":
            yield name, (shape[0], shape[2], shape[1])
        else:
            E, rows, columns = shape
            parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            for e, part in itertools.product(range(E), parts):
                yield f"{layer}.{e}.{part}.weight", (rows // len(parts), columns)


def _mtp(inside: Shapes, text: Mapping[str, Any]) -> Shapes:
    """The layer that predicts a further token: a block of full attention as those of the decoder, and what joins it."""
    D = text["hidden_size"]
    first = f"model.language_model.layers.{text['full_attention_interval'] - 1}."
    block = {f"mtp.layers.0.{name.removeprefix(first)}": s for name, s in inside.items() if name.startswith(first)}
    norms = {f"mtp.{name}.weight": (D,) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    return {"mtp.fc.weight": (D, 2 * D), **norms, **block}


# ---- many names in a line


def fold(shapes: Shapes) -> dict[str, list[int]]:
    """{line: shape}: names that differ in numbers alone, with all combinations of these, in one line."""
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
        numbers = tuple(int(part) for part in name.split(".") if part.isdecimal())
        groups.setdefault((pattern, shape), []).append(numbers)
    return {
        pattern.format(*map(_hole, product)): list(shape)
        for (pattern, shape), rows in groups.items()
        for product in _products(rows)
    }


def unfold(lines: Mapping[str, Iterable[int]]) -> Shapes:
    """{name: shape} of the lines."""
    shapes: Shapes = {}
    for line, shape in lines.items():
        pattern, holes = re.sub(r"\{[^}]*\}", "{}", line), re.findall(r"\{([^}]*)\}", line)
        for numbers in itertools.product(*map(_numbers, holes)):
            shapes[pattern.format(*numbers)] = tuple(shape)
    return shapes


def _products(rows: Iterable[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Rows of numbers as a few products of sets."""
    rests: dict[int, set[tuple[int, ...]]] = {}
    for row in rows:
        if not row:
            return [[]]
        rests.setdefault(row[0], set()).add(row[1:])
    firsts: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, rest in rests.items():
        firsts.setdefault(tuple(sorted(rest)), []).append(first)
    return [[tuple(numbers), *product] for rest, numbers in firsts.items() for product in _products(rest)]


def _hole(numbers: Iterable[int]) -> str:
    """{0..2,5} for 0, 1, 2 and 5; a single number as it is."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    ends = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return ends[0] if ends == [str(runs[0][0])] else f"{{{','.join(ends)}}}"


def _numbers(hole: str) -> list[int]:
    ends = [[int(end) for end in run.split("..")] for run in hole.split(",")]
    return [number for run in ends for number in range(run[0], run[-1] + 1)]


def page(goldens: Mapping[str, Mapping[str, list[int]]]) -> str:
    """The file: a line of names in a line of text."""
    models = []
    for name, lines in goldens.items():
        rows = [f"  {json.dumps(line)}: {json.dumps(shape)}" for line, shape in lines.items()]
        models.append(f" {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n }")
    return "{\n" + ",\n".join(models) + "\n}\n"


if __name__ == "__main__":
    PAGE.write_text(page({name: fold(tensors(hf)) for name, hf in sizes().items()}), encoding="utf-8")
