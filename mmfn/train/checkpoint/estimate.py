"""What a checkpoint will take, from the leaves of a state alone: they may be without values."""

from collections.abc import Iterable

from torch import Tensor

from mmfn.parallel.mesh.axis import Axis
from mmfn.train.checkpoint.format import bytes_written
from mmfn.train.checkpoint.write import leaves_of

GIB = 2**30


def sizes_of(items: Iterable[tuple[str, Tensor]], world: Axis) -> list[int]:
    """How many bytes of leaves `(path, leaf)` each rank writes, besides some kB of headers."""
    return bytes_written(leaves_of(items, world), world.size)


def describe_sizes(sizes: list[int]) -> str:
    """One line for a person.

    >>> describe_sizes([3 << 30, 3 << 30, 0, 0])
    'checkpoint: 6.00 GiB in 2 files, at most 3.00 GiB a rank; beside the steps a save takes as much host memory'
    """
    num_files = sum(size > 0 for size in sizes)
    files = "1 file" if num_files == 1 else f"{num_files} files"
    return (
        f"checkpoint: {sum(sizes) / GIB:,.2f} GiB in {files}, at most {max(sizes) / GIB:,.2f} GiB a rank; beside the "
        "steps a save takes as much host memory"
    )
