"""`View`: what a saved tensor is of its storage, apart from that storage, to be laid on another that holds the same."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """Shape, strides and dtype; strides and offset count elements of this dtype, the offset from where a base begins.

    Of one storage of 16 bytes:

        h: float32[4]                  View((4,), (1,), 0, float32)
        view_as_complex(h[2:])         View((), (), 1, complex64)
    """

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    is_conj: bool = False

    @staticmethod
    def of(x: Tensor, first: int = 0) -> "View | None":
        """`first`: where the base begins in the storage, in elements of x. None of a lazy negative, which torch lets
        nobody lay on another storage."""
        if x.is_neg():
            return None
        return View(x.shape, x.stride(), int(x.storage_offset()) - first, x.dtype, x.is_conj())

    def on(self, base: Tensor) -> Tensor:
        """The tensor on the storage of `base`, which may have another dtype."""
        if base.dtype != self.dtype:
            base = base.as_strided((0,), (1,)).view(self.dtype)  # no element: bytes at the end need not make up one
        x = base.as_strided(self.shape, self.stride, int(base.storage_offset()) + self.offset)
        return x.conj() if self.is_conj else x


def flat_storage(x: Tensor) -> Tensor:
    """All of x's storage as one row of x's dtype, or of bytes where those at the end make up no element."""
    num_bytes = x.untyped_storage().nbytes()
    dtype = x.dtype if num_bytes % x.element_size() == 0 else torch.uint8
    begin = (x.conj() if x.is_conj() else x).detach().as_strided((0,), (1,), 0)  # as stored, not as read
    return View(torch.Size((num_bytes // dtype.itemsize,)), (1,), 0, dtype).on(begin)
