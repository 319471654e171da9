"""What torch_npu's documents say its operators take, checked before a call: they would refuse it late, or not at all.

Source: documents of op-plugin (2026) for A2 and A3; nothing here was measured.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

MASK_SIZE = 2048
"""Rows and columns of the compressed mask that sparse modes 2 to 4, 7 and 8 of attention read."""
STATISTICS = 8
"""Copies of each row's maximum and sum that attention returns, and that its gradient reads."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest values, and the dtypes, that operators take.

    `heads`, `channels`, `tokens`, `segments`: of one call of attention with packed rows. `rotary_heads`,
    `rotary_channels`: of `npu_rotary_mul`. `experts`, `width`: groups of `npu_grouped_matmul` with one weight tensor,
    and the last dim of a factor. Of `npu_alltoallv_gmm` and `npu_gmm_alltoallv`: `exchange_dtypes`, `exchange_ranks`
    (how the name of a device begins, and its numbers of ranks), `exchange_experts` of a rank and
    `exchange_experts_of_all` ranks, `exchange_rows` that a rank sends or gets, and `exchange_chosen`, the fewest and
    the most experts of a token.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    heads: int = 256
    channels: int = 768
    tokens: int = 2**20
    segments: int = 1024
    rotary_heads: int = 999
    rotary_channels: int = 894
    experts: int = 1024
    width: int = 2**16 - 1
    exchange_dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    exchange_ranks: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("Ascend910_93", (8, 16, 32, 64, 128)),
        ("Ascend950", (2, 4, 8, 16, 32, 64)),
    )
    exchange_experts: int = 32
    exchange_experts_of_all: int = 256
    exchange_rows: int = 52_428_800 - 1
    exchange_chosen: tuple[int, int] = (2, 8)

    def check(self, op: str, x: Tensor, *sizes: tuple[str, int, int]) -> None:
        """Raise ValueError unless x's dtype and all `sizes`, (name, size, largest), are within limits."""
        if x.dtype not in self.dtypes:
            raise ValueError(
                f"{op} on an NPU takes {listed(self.dtypes)} but got {x.dtype}; cast to one of them, or use the table "
                "'portable'"
            )
        for name, size, largest in sizes:
            if size > largest:
                raise ValueError(
                    f"{op} on an NPU takes at most {largest} {name} but got {size}; split them, or use the table "
                    "'portable'"
                )


def listed(dtypes: Iterable[torch.dtype]) -> str:
    """Their names."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


LIMITS = Limits()
