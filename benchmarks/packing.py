"""How full micro-batches are and how alike ranks compute, for lengths like those of LLaVA's mixture, as a table.

    python benchmarks/packing.py                          # buckets of 8,192 and 32,768 tokens, 8 ranks, 5 draws
    python benchmarks/packing.py --buckets 16384 --ranks 32 --samples 100000

Text is log-normal: a median of 200 tokens beside an image of 256 to 1,280 tokens, of 400 in the tenth that is text
alone. Every rank has one micro-batch in a step. "as they come": samples in their order, until the next does not fit.
"""

import argparse
import time

import numpy as np
import numpy.typing as npt

from mmfn.train.data.packing_plan import Bins, plan_window

ROWS, MATMUL_ROWS = 4, 6144  # rows of a unit; where attention costs as much as matrices, in a tower of width 1,152
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--buckets", nargs="+", type=int, default=[8192, 32768], help="tokens of a micro-batch")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--samples", type=int, help="of a window; default: four steps, at least 640")
    parser.add_argument("--draws", type=int, default=5)
    args = parser.parse_args()
    print(
        "| bucket | samples | steps | real tokens | as they come | vision FLOPs, max / mean | as they come | plan s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for bucket in args.buckets:
        size = args.samples or max(640, 4 * args.ranks * bucket // 850)
        rows = [measure(bucket, args.ranks, size, seed) for seed in range(args.draws)]
        steps, fill, plain_fill, ratio, plain_ratio, plan_s = np.mean(rows, 0)
        print(
            f"| {bucket:,} | {size:,} | {steps:.0f} | **{100 * fill:.1f} %** | {100 * plain_fill:.1f} % "
            f"| **{ratio:.3f}** | {plain_ratio:.2f} | {plan_s:.2f} |"
        )


def measure(bucket: int, ranks: int, size: int, seed: int) -> tuple[float, ...]:
    """(steps, fill and that of samples as they come, imbalance and that of these, seconds of a plan) of one draw."""
    sizes, costs = draw(size, seed)
    bins = Bins(sizes=(bucket, bucket), segments=bucket // 300, per_step=ranks)
    start = time.process_time()
    plan = plan_window(sizes, costs, bins, seed, 0)
    plan_s = time.process_time() - start
    fill = sizes[: plan.num_samples, 0].sum() / (len(plan.steps) * ranks * bucket)
    ratio = imbalance(np.array([[costs[list(group)].sum() for group in step] for step in plan.steps]))
    first_B = as_they_come(sizes[:, 0], bucket)[: len(plan.steps) * ranks + 1]
    loads = np.add.reduceat(costs[:, 0], first_B)[: len(first_B) // ranks * ranks].reshape(-1, ranks)
    plain_fill = sizes[: first_B[-1], 0].sum() / ((len(first_B) - 1) * bucket)
    return len(plan.steps), fill, plain_fill, ratio, imbalance(loads), plan_s


def draw(size: int, seed: int) -> tuple[Ints, Floats]:
    """(tokens and vision units, cost of vision) of samples."""
    generator = np.random.default_rng(seed)
    has_image = generator.random(size) >= 0.1
    units = np.where(has_image, generator.integers(256, 1281, size), 0)
    logs = generator.normal(np.where(has_image, 5.3, 6.0), np.where(has_image, 0.9, 1.0))
    text = np.minimum(np.exp(logs).astype(np.int64) + 20, 6000)
    rows = ROWS * units.astype(np.float64)
    return np.stack([text + units + 2 * has_image, units], 1), (rows * (rows + MATMUL_ROWS))[:, None]


def as_they_come(tokens_W: Ints, bucket: int) -> list[int]:
    """The first sample of each micro-batch."""
    firsts, used = [0], 0
    for i, tokens in enumerate(tokens_W.tolist()):
        if used + tokens > bucket:
            firsts.append(i)
            used = 0
        used += tokens
    return firsts


def imbalance(loads_SR: Floats) -> float:
    """Largest load of a step / their mean, on average over steps."""
    return float((loads_SR.max(1) / loads_SR.mean(1)).mean())


if __name__ == "__main__":
    main()
