"""What all ranks of a run must have in common: settings, data and weights. Ranks that differ would train, wrongly.

Each machine reads its own files, and each process its own command line, so nothing but a comparison can tell.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfn.errors import UserError
from mmfn.models.disk_tensor import Ranges
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.host_values import gather_values
from mmfn.train.config.schema import Config
from mmfn.train.config.sets import list_sets
from mmfn.train.data.dataset import Dataset

# Settings that may differ: paths, whose files are compared instead, and what decides no number.
FREE = {
    "model": ("path", "adapter"),
    "data": ("train", "eval", "root", "template", "check", "cache_mib", "index_folder"),
    "train": ("allocator", "log_every", "profile"),
    "layout": ("timeout_s",),
    "eval": ("batch_samples",),
    "output": ("path", "overwrite", "report_images"),
}
WORKERS = ("workers", "ahead", "worker_kind")  # decide when ranks measure data together, with data.batch_tokens
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
SAMPLE = 16  # rows and columns of a leaf whose values are compared


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
    sections, has_windows = config.model_dump(mode="json"), config.data.batch_tokens is not None
    places = {"path", "root"}
    sets = {name: list_sets(getattr(config.data, name)) for name in ("train", "eval")}
    return {
        **{f"data.{name}": [one.model_dump(mode="json", exclude=places) for one in sets[name]] for name in sets},
        **{
            f"{section}.{name}": value
            for section, values in sections.items()
            for name, value in values.items()
            if name not in FREE.get(section, ()) and (section != "data" or has_windows or name not in WORKERS)
        },
    }


def files_in_common(config: Config, data: Mapping[str, Dataset | None]) -> dict[str, str | None]:
    """Digests of the data, the template and the model's settings, by what names them; None for what is absent.

    `data`: what is read of the settings `data.train` and `data.eval`.
    """
    folder, template = Path(config.model.path), config.data.template
    files = {} if template is None else {"data.template": Path(template)}
    if template is not None and not files["data.template"].is_file():  # the name of one that mmfn brings
        del files["data.template"]
    files |= {f"{name} of model.path": folder / name for name in MODEL_FILES if (folder / name).is_file()}
    names = ["data.template", *(f"{name} of model.path" for name in MODEL_FILES)]
    digests = {name: _file_digest(files[name]) if name in files else None for name in names}
    for name, one in data.items():
        digests[name] = None if one is None else hashlib.sha256(" ".join(one.fingerprints).encode()).hexdigest()[:12]
    return {f"{name} with the content": digest for name, digest in digests.items()}


def sample_ranges(shape: Sequence[int]) -> Ranges:
    """Which values of a leaf are compared: the middle `SAMPLE` of its last two dims, of any dims before them one.

    They lie close together in a file, whichever of the two dims is the last one there.

    >>> sample_ranges((8, 3, 4096))
    ((3, 4), (0, 3), (2040, 2056))
    """
    lengths = [1] * (len(shape) - 2) + [SAMPLE] * min(2, len(shape))
    starts = [max(0, (size - length) // 2) for size, length in zip(shape, lengths, strict=True)]
    return tuple((a, min(a + n, size)) for a, n, size in zip(starts, lengths, shape, strict=True))


def weights_in_common(samples: Mapping[str, Tensor]) -> dict[str, str]:
    """A digest of weights, of the values in `sample_ranges` of each leaf by its path.

    Two checkpoints that were trained differently differ in every leaf, so a sample tells them apart; it costs nothing
    beside reading them.
    """
    digest = hashlib.sha256()
    for path, sample in samples.items():
        digest.update(f"{path} {sample.dtype} {tuple(sample.shape)} ".encode())
        digest.update(sample.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {"weights (model.path, model.adapter) with the content": digest.hexdigest()[:12]}


@contextmanager
def errors_in_common(world: Axis) -> Iterator[None]:
    """What a user has to mend on one rank ends all of them with its sentence, and none waits for the others.

    `world`: all ranks, on the CPU. What is done inside calls no collective. Raises ValueError, that of the first rank
    that met one.
    """
    error = None
    try:
        yield
    except UserError as caught:
        error = caught
    sentences = gather_values(None if error is None else str(error), world, "errors")
    if found := [sentence for sentence in sentences if sentence is not None]:
        raise UserError(found[0]) from error


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
