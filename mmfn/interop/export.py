"""Writing Hugging Face checkpoints: sharded safetensors, config and asset files, published by one rename."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mmfn.errors import UserError
from mmfn.interop import verbatim
from mmfn.interop.files import INDEX, SINGLE
from mmfn.interop.verbatim import Span
from mmfn.models.keymap import KeyMap
from mmfn.tree import Tree

# Files of a checkpoint folder that are neither weights nor config.json.
ASSETS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


def check_layout(specs: Tree, key_map: KeyMap, layout: str) -> None:
    """Raise ValueError where transformers would misread the layout.

    It tells layouts apart by the shape of each tensor alone, so it takes one whose dims are in another order than its
    own, but of the same sizes, for its own.
    """
    library = key_map.disk_tensors(specs, "transformers")
    for name, tensor in key_map.disk_tensors(specs, layout).items():
        if name in library and tensor.shape == library[name].shape and tensor.dims != library[name].dims:
            raise UserError(
                f"tensor {name!r} has shape {list(tensor.shape)} in every layout, so transformers would misread that "
                f"of {layout!r}; save with layout='transformers' (in a config: output.experts)"
            )


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    assets: Path | None,
    extra: Mapping[str, Span],
    max_shard_bytes: int,
    overwrite: bool,
) -> None:
    """Write a checkpoint beside `folder` and rename it into place: a reader never sees half of one.

    `extra`: tensors of another checkpoint that are copied into this one as they are, in files of their own. With
    `overwrite` the whole old checkpoint is replaced; between two renames there is none for a moment, and an interrupt
    puts the old one back. A link is followed. Raises ValueError when `folder` exists and is neither empty nor, with
    `overwrite`, a checkpoint, or `assets` is not a folder; OSError when the disk does not take it.
    """
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_shard_bytes} but must be positive; 5_000_000_000 is usual")
    if assets is not None and not assets.is_dir():
        raise UserError(f"assets {assets} is not a folder; pass the folder that holds the tokenizer files")
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise UserError(f"target {folder} exists and is not an empty folder; choose another or pass overwrite=True")
        if not (folder / "config.json").is_file():
            raise UserError(f"target {folder} is no checkpoint (no config.json) and stays as it is; choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()  # not the temporary folder itself, whose mode is private
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (fresh / "config.json").write_text(text, encoding="utf-8")
        _write_weights(fresh, tensors, extra, max_shard_bytes)
        for source in _assets(assets):
            shutil.copyfile(source, fresh / source.name)
        _publish(fresh, folder, Path(scratch) / "old")


def _write_weights(
    folder: Path, tensors: Mapping[str, Tensor], extra: Mapping[str, Span], max_shard_bytes: int
) -> None:
    nbytes = {name: t.nbytes for name, t in tensors.items()} | {name: span.nbytes for name, span in extra.items()}
    shards = _shards({name: nbytes[name] for name in tensors}, max_shard_bytes)
    num_saved = len(shards)
    shards += _shards({name: nbytes[name] for name in extra}, max_shard_bytes) if extra else []
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    for file, names in zip(files[:num_saved], shards[:num_saved], strict=True):
        values = {n: tensors[n].detach().cpu().contiguous() for n in names}
        try:
            save_file(values, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # its form of a full disk
            raise OSError(f"weight file {file} cannot be written: {error}") from error
        shutil.copymode(folder / "config.json", folder / file)  # safetensors makes files only the owner can read
    for file, names in zip(files[num_saved:], shards[num_saved:], strict=True):
        verbatim.write(folder / file, {name: extra[name] for name in names})
    if len(shards) > 1:
        total = sum(nbytes.values())
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(nbytes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut before a shard would exceed the size; a larger tensor is a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in nbytes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _assets(folder: Path | None) -> Sequence[Path]:
    if folder is None:
        return []
    return sorted({path for pattern in ASSETS for path in folder.glob(pattern) if path.is_file()})


def _publish(fresh: Path, folder: Path, old: Path) -> None:
    try:
        if folder.exists():
            os.rename(folder, old)
        os.rename(fresh, folder)
    except BaseException:  # an interrupt too: the scratch folder, and the old checkpoint in it, is about to be deleted
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
