"""What a large JSONL file costs: its index once, and then any place of the order of data.

    PYTHONPATH=.:examples python benchmarks/streams.py [--gib 10] [--rows 10000000] [--folder /tmp]

A file of so many GiB and rows is written to the folder (and removed), each row a conversation of its own number. Then
two processes open it: the first makes the index, the second finds it there and gives the sample at the last place but
one of the first epoch. Memory is what the process holds then above what it held before it opened the file, and the
whole of it, most of which is torch and transformers.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import digits
import torch

from mmfn.train.build.processor import load_model_processor
from mmfn.train.data import Dataset

BLOCK = 10_000  # rows written at once
MIB = 2**20


def write_rows(path: Path, gib: float, rows: int) -> None:
    """Rows of equal length, about `gib` in all."""
    size = int(gib * 2**30 / rows)
    talk = [{"role": "user", "content": ""}, {"role": "assistant", "content": "It is that."}]
    short = json.dumps({"id": "0" * 9, "messages": talk})
    question = ("What is it? " * (1 + size // 12))[: max(1, size - len(short) - 1)]
    row = short.replace('"content": ""', f'"content": "{question}"') + "\n"
    head, tail = row.split("0" * 9)
    with open(path, "w", encoding="utf-8") as file:
        for first in range(0, rows, BLOCK):
            file.writelines(f"{head}{number:09d}{tail}" for number in range(first, min(first + BLOCK, rows)))


def visit(path: Path, model: str, place: int | None, results: Any) -> None:
    """Open the file; give the sample at a place of the order. Sends (seconds to open, seconds in all, MiB, MiB)."""
    processor = load_model_processor(model)
    before, start = resident_bytes(), time.perf_counter()
    data = Dataset(path, processor)
    opened = time.perf_counter() - start
    if place is not None:
        row = int(data.order(0).rows(torch.tensor([place])))
        sample = data.sample(row)
        if sample.id != f"{row:09d}":
            raise SystemExit(f"row {row} is sample {sample.id}")
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results.put((opened, time.perf_counter() - start, (resident_bytes() - before) / MIB, whole))


def resident_bytes() -> int:
    """What this process holds in memory, mapped files included."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Write, index, resume."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gib", type=float, default=10.0)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "rows.jsonl"
        digits.write_demo(Path(folder) / "demo")
        write_rows(path, args.gib, args.rows)
        size = path.stat().st_size
        print(f"{args.rows:,} rows, {size / 2**30:.2f} GiB")
        context = multiprocessing.get_context("spawn")
        for what, place in (("first opening", None), ("index present", args.rows - 2)):
            results = context.Queue()
            process = context.Process(target=visit, args=(path, str(Path(folder) / "demo" / "model"), place, results))
            process.start()
            opened, total, more, whole = results.get()
            process.join()
            if place is None:
                print(
                    f"{what}: {opened:.1f} s, {size / opened / 1e6:.0f} MB/s, {more:.0f} MiB more, {whole:.0f} in all"
                )
            else:
                print(f"{what}: opened in {opened:.3f} s, sample at place {place:,} after {total:.3f} s, ", end="")
                print(f"{more:.0f} MiB more, {whole:.0f} in all")


if __name__ == "__main__":
    main()
