"""Time and peak memory of `linear_cross_entropy` against full logits, forward and backward, printed as a table.

    python benchmarks/cross_entropy.py                     # the small sizes, 5 rounds, both allocators
    python benchmarks/cross_entropy.py --sizes 2048x151936x1024 --rounds 3

Each size and allocator gets a process of its own; within it the two variants alternate, and the ratio is the median
over rounds of time / time of full logits. Memory is the resident high-water mark above the level before a call, in
calls of their own. `beyond` leaves the head's gradient, which both must hold, out of both sides. The "retained"
allocator keeps freed memory (glibc mallopt: M_MMAP_MAX 0, huge M_TRIM_THRESHOLD), which takes page faults out of the
comparison. Linux with glibc only.
"""

import argparse
import json
import re
import statistics

import torch
import torch.nn.functional as F
from measure import in_a_process, peak_mib, seconds
from torch import Tensor

from mmfn import ops
from mmfn.ops.cross_entropy import chunk_rows
from mmfn.train.run.allocator import retain_freed_memory

SIZES = ("4096x16384x512/3", "4096x16384x512", "4096x32768x512")
MIB = 2**20


def full_logits(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, weights_T: Tensor) -> Tensor:
    """The usual loss: all logits, in float32."""
    losses_T = F.cross_entropy((x_TD @ weight_VD.T).float(), labels_T, ignore_index=-100, reduction="none")
    return (losses_T * weights_T).sum()


def main() -> None:
    """Run every size under every allocator, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="TxVxD, or TxVxD/n for one token in n supervised")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--allocators", nargs="+", choices=("default", "retained"), default=("default", "retained"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk", type=int, help="rows of logits held at a time; default: chunk_rows(V)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.sizes[0], args.dtype, args.allocators[0], args.rounds, args.chunk)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, {args.rounds} rounds")
    print("| size/one in | allocator | chunk | full s | mmfn s | time | full MiB | mmfn MiB | beyond head's gradient |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in args.sizes:
        for allocator in args.allocators:
            print(row(size, allocator, args), flush=True)


def row(size: str, allocator: str, args: argparse.Namespace) -> str:
    """One line of the table, measured in a new process."""
    options = ["--sizes", size, "--allocators", allocator, "--dtype", args.dtype, "--rounds", str(args.rounds)]
    r = in_a_process(__file__, options + (["--chunk", str(args.chunk)] if args.chunk else []))
    beyond = (r["mmfn_mib"] - r["head_mib"]) / (r["full_mib"] - r["head_mib"])
    return (
        f"| {size} | {allocator} | {r['chunk']} | {r['full_s']:.3f} | {r['mmfn_s']:.3f} | **{r['ratio']:.2f}** "
        f"| {r['full_mib']:.0f} | {r['mmfn_mib']:.0f} | **{beyond:.3f}** |"
    )


def measure(size: str, dtype: str, allocator: str, rounds: int, chunk: int | None) -> dict[str, float]:
    """Times in seconds and memory in MiB of both variants, and the median ratio of times."""
    if allocator == "retained":
        retain_freed_memory()
    leaves, labels_T, weights_T = inputs(size, getattr(torch, dtype))
    chunk = chunk or chunk_rows(leaves[1].shape[0])

    def full() -> None:
        torch.autograd.grad(full_logits(*leaves, labels_T, weights_T), leaves)

    def mmfn() -> None:
        torch.autograd.grad(ops.portable().linear_cross_entropy(*leaves, labels_T, weights_T, chunk=chunk)[0], leaves)

    memory = {}
    for fn in (full, mmfn):
        fn()
        memory[fn.__name__] = peak_mib(fn)
    times = [(seconds(full), seconds(mmfn)) for _ in range(rounds)]
    return {
        "chunk": chunk,
        "full_s": statistics.median(a for a, _ in times),
        "mmfn_s": statistics.median(b for _, b in times),
        "ratio": statistics.median(b / a for a, b in times),
        "full_mib": memory["full"],
        "mmfn_mib": memory["mmfn"],
        "head_mib": leaves[1].numel() * leaves[1].element_size() / MIB,
    }


def inputs(size: str, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Hidden states and head as leaves, labels and weights."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:/(\d+))?", size)
    if match is None:
        raise SystemExit(f"size {size!r} is not TxVxD or TxVxD/n, such as 4096x16384x512/3")
    T, V, D, every = (int(x or 1) for x in match.groups())
    draw = torch.Generator().manual_seed(0)
    x_TD = torch.randn(T, D, generator=draw).to(dtype).requires_grad_()
    weight_VD = (torch.randn(V, D, generator=draw) * D**-0.5).to(dtype).requires_grad_()
    labels_T = torch.randint(V, (T,), generator=draw)
    labels_T[torch.arange(T) % every != 0] = -100
    return (x_TD, weight_VD), labels_T, torch.rand(T, generator=draw)


if __name__ == "__main__":
    main()
