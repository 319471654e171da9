"""What all ranks of a run must have in common: settings, data and weights. Ranks that differ would train, wrongly.

Each machine reads its own files, and each process its own command line, so nothing but a comparison can tell.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmfn import tree
from mmfn.errors import UserError
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.host_values import gather_values
from mmfn.train.config.schema import Config
from mmfn.tree import Tree

# Settings that may differ: paths, whose files are compared instead, and what decides no number.
FREE = {
    "model": ("path", "adapter"),
    "data": ("train", "eval", "root", "template", "check", "workers", "ahead", "cache_mib"),
    "train": ("allocator", "log_every"),
    "layout": ("timeout_s",),
    "eval": ("batch_samples",),
    "output": ("path", "overwrite", "report_images"),
}
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
SAMPLE = 4096  # values of a leaf that are compared


def check_same(values: Mapping[str, Any], world: Axis) -> None:
    """Raise ValueError, on all ranks, unless they have the same values; it names a rank and what differs there.

    `world`: all ranks, on the CPU. A value is anything JSON holds.
    """
    first, *others = gather_values(dict(values), world, "what ranks have in common")
    for rank, other in enumerate(others, start=1):
        for name in values:
            if other.get(name) != first.get(name):
                raise UserError(
                    f"rank {rank} has {name} {other.get(name)!r} but rank 0 has {first.get(name)!r}; start all ranks "
                    "with the same settings, data and weights"
                )


def settings_in_common(config: Config) -> dict[str, Any]:
    """Every dotted setting that decides numbers, and its value."""
    sections = config.model_dump(mode="json")
    return {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in values.items()
        if name not in FREE.get(section, ())
    }


def files_in_common(config: Config) -> dict[str, str | None]:
    """Digests of the data files, the template and the model's settings, by what names them; None for what is absent."""
    data, folder = config.data, Path(config.model.path)
    paths = {"data.train": data.train, "data.eval": data.eval, "data.template": data.template}
    files = {name: Path(path) for name, path in paths.items() if path is not None}
    files |= {f"{name} of model.path": folder / name for name in MODEL_FILES if (folder / name).is_file()}
    names = [*paths, *(f"{name} of model.path" for name in MODEL_FILES)]
    return {f"{name} with the content": _file_digest(files[name]) if name in files else None for name in names}


def weights_in_common(params: Tree) -> dict[str, str]:
    """A digest of whole parameters: of each leaf at most `SAMPLE` values, evenly spaced.

    Two checkpoints that were trained differently differ in every leaf, so a sample tells them apart; it costs nothing
    beside reading them.
    """
    digest = hashlib.sha256()
    for path, leaf in tree.items(params):
        flat = leaf.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLE)].to("cpu").contiguous()
        digest.update(f"{path} {leaf.dtype} {tuple(leaf.shape)} ".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return {"weights (model.path, model.adapter) with the content": digest.hexdigest()[:12]}


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
