"""The table of NVIDIA GPUs: kernels that torch itself brings, none of which waits for the device.

What is not named here is the portable form, which reads nothing either but for the loss (its number of labels).
"""

from dataclasses import replace

from mmfn.ops import Ops, portable
from mmfn.ops.cross_entropy import ACCELERATOR_BYTES
from mmfn.ops.cuda import attention, experts, norm


def cuda() -> Ops:
    """The table. It is made on any machine; what a GPU, a dtype or a shape does not have is said where it is called."""
    return replace(
        portable(cross_entropy="logits", logit_bytes=ACCELERATOR_BYTES),
        rms_norm=norm.KERNEL,
        **attention.KERNELS,
        experts=experts.KERNEL,
        notes=(
            "attention by FlashAttention over packed segments, experts by grouped products: bfloat16 or float16",
            "rms_norm in one kernel; in compiled blocks by the formula, which the compiler fuses",
            "all else is portable; train.compile fuses it: rotary and swiglu, of which torch has no fused operators",
        ),
    )
