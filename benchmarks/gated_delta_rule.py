"""Time and peak memory of `gated_delta_rule` against the library's, forward and backward, printed as a table.

    python benchmarks/gated_delta_rule.py                        # 32 and 8 heads of 128 channels, 5 rounds
    python benchmarks/gated_delta_rule.py --sizes 16:48x4096x128 # 16 heads of queries and keys, 48 of values

The library's is what transformers runs without a kernel of a device, `torch_chunk_gated_delta_rule`, on one row. Each
size gets a process of its own; within it the two alternate, and the ratio is the median over rounds of the library's
time / time. Memory is the resident high-water mark above the level before a call, in calls of their own; it includes
the gradients and the output, which both must hold. No figures where the two compute different ones. Linux with glibc.
"""

import argparse
import json
import re
import statistics
import warnings

import torch
from measure import in_a_process, peak_mib, seconds
from torch import Tensor
from torch.nn.functional import softplus
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from mmfn import ops
from mmfn.batch import Segments

SIZES = ("32x4096x128", "8x4096x128", "16:32x4096x128")
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest value of an output or gradient


def main() -> None:
    """Run every size in a process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=SIZES, help="HxTxC: heads, tokens, channels; K:HxTxC with K of keys"
    )
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.sizes[0], args.dtype, args.rounds)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, {args.rounds} rounds")
    print("| heads x tokens x channels | library s | mmfn s | times faster | library MiB | mmfn MiB | memory |")
    print("|---|---|---|---|---|---|---|")
    for size in args.sizes:
        r = in_a_process(__file__, ["--sizes", size, "--dtype", args.dtype, "--rounds", str(args.rounds)])
        print(
            f"| {size} | {r['library_s']:.2f} | {r['mmfn_s']:.2f} | **{r['ratio']:.1f}** | {r['library_mib']:.0f} "
            f"| {r['mmfn_mib']:.0f} | **{r['mmfn_mib'] / r['library_mib']:.2f}** |",
            flush=True,
        )


def measure(size: str, dtype: str, rounds: int) -> dict[str, float]:
    """Times in seconds and memory in MiB of both, and the median ratio of times."""
    warnings.filterwarnings("ignore")
    rows, do_THV = inputs(size, getattr(torch, dtype))
    segments, rule = Segments.of(torch.tensor([0, len(do_THV)], dtype=torch.int32)), ops.portable().gated_delta_rule
    results: dict[str, list[Tensor]] = {}

    def library() -> None:
        o = torch_chunk_gated_delta_rule(*(x[None] for x in rows), use_qk_l2norm_in_kernel=True)[0][0]
        results["library"] = [o.detach(), *torch.autograd.grad(o, rows, do_THV)]

    def mmfn() -> None:
        q, k, v, g, beta = rows
        o = rule(q, k, v, g, beta, segments)
        results["mmfn"] = [o.detach(), *torch.autograd.grad(o, rows, do_THV)]

    for fn in (library, mmfn):
        fn()
    for a, b in zip(*results.values(), strict=True):
        if (error := ((a - b).abs().max() / a.abs().max()).item()) > TOLERANCE[dtype]:
            raise SystemExit(f"{size}: the two differ by {error:.1e} of the largest value")
    memory = {}
    for fn in (library, mmfn):
        results.clear()
        memory[fn.__name__] = peak_mib(fn)
    times = [(seconds(library), seconds(mmfn)) for _ in range(rounds)]
    return {
        "library_s": statistics.median(a for a, _ in times),
        "mmfn_s": statistics.median(b for _, b in times),
        "ratio": statistics.median(a / b for a, b in times),
        "library_mib": memory["library"],
        "mmfn_mib": memory["mmfn"],
    }


def inputs(size: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v, g and beta as leaves, and the gradient of the output."""
    match = re.fullmatch(r"(?:(\d+):)?(\d+)x(\d+)x(\d+)", size)
    if match is None:
        raise SystemExit(f"size {size!r} is not HxTxC or K:HxTxC, such as 16:32x4096x128")
    K, H, T, C = (int(x or match[2]) for x in match.groups())
    draw = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(T, n, C, generator=draw).to(dtype) for n in (K, K, H, H))
    g_TH = -torch.linspace(0.01, 16, H) * softplus(torch.randn(T, H, generator=draw) - 4)  # as models draw it
    beta_TH = torch.randn(T, H, generator=draw).sigmoid().to(dtype)
    return [x.requires_grad_() for x in (q, k, v, g_TH, beta_TH)], do


if __name__ == "__main__":
    main()
