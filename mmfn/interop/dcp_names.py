"""Names and shapes of weights in folders of torch.distributed.checkpoint, as trainers have them that merge experts.

Experts there are "hub", as in the published checkpoint; "merged", one tensor [E, in, out] for each of gate and up
together and down; or "flat", the same as [E * in, out]. A name is that of the published checkpoint behind a prefix.

Legend: E experts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from mmfn.errors import UserError
from mmfn.models.disk_tensor import DiskTensor, whole
from mmfn.models.keymap import KeyMap
from mmfn.spec import EXPERTS
from mmfn.tree import Tree

STACKS = {"hub": "", "merged": ", merged", "flat": ", flat"}
"""How experts may be stored, and what the name of a layout gets behind it."""
TOP = ("model.", "")  # of the state's entries that with weights; some hold nothing else
PREFIXES = ("model.", "")  # of names inside it
WRAPPERS = ("thinker.",)  # a part that trainers hold alone, without this in front of its names


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """A name of the checkpoint `cut + x` is called `put + x` in the other."""

    cut: str
    put: str

    def rename(self, names: Iterable[str]) -> dict[str, str]:
        """`{new name: name}` of those that begin so."""
        return {self.put + name.removeprefix(self.cut): name for name in names if name.startswith(self.cut)}


def layouts(specs: Tree, key_map: KeyMap) -> dict[str, dict[str, DiskTensor]]:
    """Every layout of a family by name, and each with its experts merged, and flat."""
    found: dict[str, dict[str, DiskTensor]] = {}
    for name in key_map.layouts:
        plain = key_map.disk_tensors(specs, name)
        for stack, suffix in STACKS.items():
            tensors = plain if stack == "hub" else _stacked(plain, is_flat=stack == "flat")
            if tensors not in found.values():
                found[name + suffix] = tensors
    return found


def tensors_of(specs: Tree, key_map: KeyMap, experts: str) -> dict[str, DiskTensor]:
    """The tensors of the published checkpoint with its experts as `experts` says."""
    plain = key_map.disk_tensors(specs)
    return plain if experts == "hub" else _stacked(plain, is_flat=experts == "flat")


def find_prefixes(names: Iterable[str], known: Iterable[Mapping[str, object]]) -> Prefixes:
    """How names are to be changed so that as many as possible are those of one of the `known` layouts."""
    stored, layouts = list(names), [set(layout) for layout in known]
    options = [Prefixes(cut=top + prefix, put="") for top in TOP for prefix in PREFIXES]
    options += [replace(one, put=wrapper) for one in options for wrapper in WRAPPERS]
    hits = {one: max(len(one.rename(stored).keys() & layout) for layout in layouts) for one in options}
    best = max(options, key=hits.__getitem__)
    if not hits[best]:
        raise UserError(
            f"no tensor has a name of this model, such as {min(layouts[0])!r}, but {min(stored, default='none')!r}; "
            "name the model that the checkpoint is of"
        )
    return best


def _stacked(plain: Mapping[str, DiskTensor], *, is_flat: bool) -> dict[str, DiskTensor]:
    """Tensors with every stack of experts as one, [E, in, out]."""
    found: dict[str, DiskTensor] = {}
    for name, tensor in plain.items():
        leaf = tensor.leaf
        if len(leaf.shape) != 3 or leaf.axes[0] != EXPERTS:
            found[name] = tensor
            continue
        stack, out, into = leaf.shape
        head, _, tail = name.partition(".experts.")
        last = tail if not tail[0].isdigit() else "gate_up_proj" if leaf.parts == 2 else "down_proj"
        found[f"{head}.experts.{last}"] = DiskTensor(
            path=tensor.path,
            ranges=whole(leaf.shape),
            dims=(0, 2, 1),
            shape=(stack * into, out) if is_flat else (stack, into, out),
            leaf=leaf,
        )
    return found
