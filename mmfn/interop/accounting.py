"""Two-way accounting: every stored tensor has one use, every leaf is filled once, or a load refuses."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from mmfn.errors import UserError
from mmfn.interop.files import DTYPES, FileTensor
from mmfn.models.disk_tensor import DiskTensor
from mmfn.models.keymap import KeyMap
from mmfn.tree import Tree

Pair = tuple[FileTensor, DiskTensor]
"""A tensor of a file and what of a leaf it holds."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """What every tensor of a checkpoint is for.

    `leaves`: by path, what a leaf is stored in. `copies`: by path, tensors that repeat a leaf. `verbatim`: names that
    no leaf is read from and that a checkpoint saved later carries on. `layout`: that of the names and shapes.
    """

    leaves: Mapping[str, list[Pair]]
    copies: Mapping[str, list[FileTensor]]
    verbatim: tuple[str, ...]
    layout: str


def account(
    where: Path | str,
    specs: Tree,
    key_map: KeyMap,
    tensors: Mapping[str, FileTensor],
    options: Mapping[str, Mapping[str, DiskTensor]] | None = None,
) -> Account:
    """The use of all `tensors` by name.

    `options`: the layouts they may have, by default those of the key map. Raises ValueError naming tensor, file and
    nearest name for a missing or unexpected tensor, a wrong shape or kind of dtype, and tensors in different layouts.
    `where`: the checkpoint, in messages.
    """
    options = options or {layout: key_map.disk_tensors(specs, layout) for layout in key_map.layouts}
    layout, names = _choose_layout(where, options, tensors)
    spare = {name: tensor for name, tensor in tensors.items() if name not in names}
    copies = {name: path for name, path in key_map.copies.items() if name in spare}
    rest = [name for name in spare if name not in copies and not key_map.is_ignored(name)]
    verbatim = key_map.verbatim_of(rest)
    unexpected = sorted(set(rest) - set(verbatim))
    check(where, names, tensors, unexpected)
    leaves: dict[str, list[Pair]] = {}
    for name, target in names.items():
        leaves.setdefault(target.path, []).append((tensors[name], target))
    repeats: dict[str, list[FileTensor]] = {}
    for name, path in copies.items():
        assert len(leaves[path]) == 1, f"{path} has a copy and is stored in several tensors"
        repeats.setdefault(path, []).append(tensors[name])
    return Account(leaves=leaves, copies=repeats, verbatim=verbatim, layout=layout)


def check(
    where: Path | str,
    names: Mapping[str, DiskTensor],
    tensors: Mapping[str, FileTensor],
    unexpected: list[str],
) -> None:
    """Raise ValueError unless `tensors` hold all `names` with their shapes and kinds of dtype, and no `unexpected`."""
    if missing := [name for name in names if name not in tensors]:
        name = missing[0]
        raise UserError(
            f"{where} lacks tensor {name!r} for parameter {names[name].path}{nearest(name, unexpected or tensors)}"
            f"{_more(missing)}; config and weights must belong together"
        )
    if unexpected:
        name = unexpected[0]
        raise UserError(
            f"tensor {name!r} in {tensors[name].file} of {where} belongs to no parameter{nearest(name, names)}"
            f"{_more(unexpected)}; config and weights must belong together"
        )
    for name, target in names.items():
        source = tensors[name]
        if source.shape != target.shape:
            raise UserError(
                f"tensor {name!r} in {source.file} of {where} has shape {list(source.shape)} but the config needs "
                f"{list(target.shape)}; config and weights must belong together"
            )
        dtype = target.leaf.dtype
        kind = "float" if dtype is None or dtype.is_floating_point else "integer"
        if _kind(source.dtype) != kind:
            raise UserError(
                f"tensor {name!r} in {source.file} of {where} has dtype {source.dtype} but a {kind} tensor is needed; "
                "convert the checkpoint (quantized weights are not supported)"
            )


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; nearest is 'x'"`, or nothing when there is no candidate."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; nearest is {near[0]!r}" if near else ""


def _choose_layout(
    where: Path | str, options: Mapping[str, Mapping[str, DiskTensor]], tensors: Mapping[str, FileTensor]
) -> tuple[str, Mapping[str, DiskTensor]]:
    """The layout that most names and shapes fit, and its tensors by name.

    One tensor alone may fit two layouts (a square one does), so all are asked together. Raises ValueError when they
    do not agree.
    """

    def fits(layout: str, name: str) -> bool:
        target = options[layout].get(name)
        return target is not None and name in tensors and tensors[name].shape == target.shape

    misfits = {layout: [name for name in names if not fits(layout, name)] for layout, names in options.items()}
    best = min(options, key=lambda layout: len(misfits[layout]))
    spare = [name for name in tensors if name not in options[best]]
    for name in (*misfits[best], *spare):
        if other := next((layout for layout in options if fits(layout, name)), None):
            raise UserError(
                f"tensor {name!r} in {tensors[name].file} of {where} has shape {list(tensors[name].shape)}, the layout "
                f"of {other!r}, but other tensors have that of {best!r}; store them all in one layout"
            )
    return best, options[best]


def _kind(dtype: str) -> str:
    if dtype not in DTYPES:
        return dtype
    return "float" if DTYPES[dtype].is_floating_point else "bool" if dtype == "BOOL" else "integer"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
