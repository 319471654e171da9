"""Draws the calls of `ops.table("npu")`, and what is proved of them, into docs/npu.md: `make npu`."""

from collections import Counter
from dataclasses import fields
from pathlib import Path

from mmfn.ops import kernels
from mmfn.ops.kernel import Kernel
from mmfn.ops.npu import PORTABLE
from mmfn.ops.npu.limits import LIMITS, Limits
from tests.npu.facts import KERNELS_OF_CANN, READS, SINGLE
from tests.npu.mutations import MUTATIONS
from tests.npu.table import emulated

PAGE = Path(__file__).with_name("npu.md")
INTRODUCTION = """# Ops for NPUs

`model.kernels: npu` computes with torch_npu's operators where it has one that trains, and with the portable form for
the rest. **No NPU has run this code: values on hardware, speed and CANN-side limits are unverified.** What is proved
without one, by `make test` and `make test-npu` (which installs the released torch_npu 2.13.0 beside, in `.venv-npu`):
"""
LEVELS: list[tuple[str, ...]] = [
    ("0", "schemas, read from the wheel", "the emulated operators take the arguments that the released ones take"),
    (
        "1",
        "emulated operators, on the CPU, written after their documents",
        "every entry of the table, its gradients and the whole step of every family give in float64 what the reference "
        "gives, under dp, ep, every kind of cp, remat and accumulation; "
        f"{len(MUTATIONS)} wrong calls (an argument changed on its way) are each found by a named check",
    ),
    (
        "2",
        "torch_npu itself, with NPUs whose memory is the host's and whose kernels are emulated",
        "its dispatch and its autograd run the step of every family under dp, ep and every kind of cp: every metric, "
        "gradient and new parameter is, in float32, that of one device (and of some families in bfloat16); none "
        "of torch's operators that it calls lacks a kernel",
    ),
    (
        "3",
        "the same steps, and single calls",
        "every call passes torch_npu's own host checks and gets to the kernel of CANN that it should; wrong calls are "
        "refused",
    ),
]
NOT_PROVED = """Not proved: what CANN computes, and how fast; the checks in CANN; memory; collectives over HCCL. What a
document leaves undefined is NaN in the emulation (rows behind the last end, weights of a group without rows), so
nothing rests on it. One fault no result can show: causal calls state the mask that is aligned at the bottom right
(sparse mode 3), and as queries and keys are the same tokens there, one aligned at the top left is the same.

`layout.fused_exchange` sends rows of experts by `npu_alltoallv_gmm` and `npu_gmm_alltoallv`, which multiply them too
(`mmfn/ops/npu/exchange.py`); the default exchanges and multiplies apart. Their documents name inference: gradients are
ours, each the other operator's. Rows are read on the host once a layer, as without, and a rank without rows sends
itself one of zeros, as the operators want one. With `layout.capacity`, and in a graph, it is refused. Plans count it as
the exchange and the products apart, so no time is hidden in them; `mmfn replay` holds no experts against another table
where it is on. Their documents list A3 and 950 and not A2. In tests, ranks of one process or over gloo stand for those
of HCCL, so that its communicator, and the name it is known by, are not proved.

`mmfn.ops.npu.npu(layout=..., lengths=...)` makes the table with another layout of attention (`BSND`, `BNSD`: a call
for each run of segments of one length), or with tensors of lengths (`npu_fusion_attention_v3`), which graphs need.
"""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def calls() -> list[tuple[str, ...]]:
    """A row for each operator."""
    entries: dict[str, list[str]] = {}
    table = emulated()
    for name, op in {**kernels(table), "experts_over_ranks": table.experts_over_ranks}.items():
        assert isinstance(op, Kernel)
        for operator in op.operators:
            space, _, short = operator.partition("::")
            if space == "npu":
                entries.setdefault(short, []).append(name)
    wrong = Counter(name for name, _ in MUTATIONS)
    wrong["_npu_moe_token_unpermute"] = wrong.pop("npu_moe_token_unpermute")  # by which it is called
    found = {**KERNELS_OF_CANN, **SINGLE}
    return [
        (
            f"`{name}`",
            ", ".join(entries[name]),
            "0, 1, 2, 3" if name in KERNELS_OF_CANN else levels(name),
            f"`{found[name]}`" if name in found else "",
            str(wrong[name] or ""),
        )
        for name in entries
    ]


def levels(name: str) -> str:
    """Of an operator that no step calls."""
    return "0, 1, 3 (single call)" if name in SINGLE else "0, 1"


def limits() -> list[tuple[str, ...]]:
    """What is refused before a call, by name."""
    found = [("`dtypes`", ", ".join(str(dtype).removeprefix("torch.") for dtype in LIMITS.dtypes))]
    for name, value in ((f.name, getattr(LIMITS, f.name)) for f in fields(Limits)):
        if isinstance(value, int):
            found.append((f"`{name}`", f"at most {value:,}"))
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in LIMITS.exchange_dtypes)
    ranks = "; ".join(f"{', '.join(map(str, sizes))} of {device}" for device, sizes in LIMITS.exchange_ranks)
    chosen = "from {} to {}".format(*LIMITS.exchange_chosen)
    return [*found, ("`exchange_dtypes`", dtypes), ("`exchange_ranks`", ranks), ("`exchange_chosen`", chosen)]


def page() -> str:
    """The whole page."""
    return "\n".join(
        [
            INTRODUCTION,
            _table(("level", "how", "what it proves"), LEVELS),
            NOT_PROVED,
            "## Calls\n",
            _table(("operator", "entries of the table", "levels", "kernel of CANN", "wrong calls found"), calls()),
            "A gradient is called by torch_npu's autograd, but for those of grouped products and of blocks of",
            "attention, which it has none for, and of rotary, whose backward is the opposite turn: these are ours.\n",
            "## Limits\n",
            "Of the documents (op-plugin, 2026, for A2 and A3); what is beyond is refused by name. More `segments` are",
            "split into several calls, as segments do not meet.\n",
            _table(("limit", "value"), limits()),
            "## The portable form\n",
            _table(("entry", "why"), [(f"`{name}`", reason) for name, reason in PORTABLE.items()]),
            "## What costs time\n",
            "Every operator of a step has a kernel for NPUs; torch_npu would run one without on the CPU.\n",
            "Where the host waits for the device in a step:\n",
            _table(("where", "what for"), [(f"`{name}`", what) for name, what in READS.items()]),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
