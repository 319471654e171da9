"""Measurements of cells as questions in plain text: real records of tumours, benign or malignant, and a tiny model.

    python examples/cells.py OUT

writes the 569 records of scikit-learn's breast cancer data (Wisconsin, 30 measurements each) as `train.json` (455) and
`eval.json` (114) in the messages format: each measurement as one digit, its tenth among those of the training records.
`model/` is that of `digits.py`, which sees no image here. Running it again writes the same bytes.

    mmfn train configs/demo-text.yaml        # or all of it: make demo-text

trains 80 steps in about 20 seconds on one core: held-out accuracy 0.956 (109 of 114; the larger class is 0.63 of all).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from digits import write_json, write_model
from sklearn.datasets import load_breast_cancer

from mmfn import rng

NUM_TRAIN = 455
BEGINNING, END = "Cells measure ", ". Benign or malignant?"


def write_demo(out: Path) -> None:
    """Write both datasets and the model folder under `out`, which is created. The split is a fixed permutation."""
    out.mkdir(parents=True, exist_ok=True)
    data = load_breast_cancer()
    order = rng.permutation(len(data.target), 0, "cells")
    bounds = np.quantile(data.data[order[:NUM_TRAIN]], np.arange(1, 10) / 10, axis=0)  # 9 per measurement
    tenths = (data.data[:, None] > bounds).sum(1)
    entries = []
    for index in order:
        question = BEGINNING + " ".join(map(str, tenths[index])) + END
        answer = str(data.target_names[data.target[index]])
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        entries.append({"id": f"record-{index:03d}", "messages": messages})
    write_json(out / "train.json", entries[:NUM_TRAIN])
    write_json(out / "eval.json", entries[NUM_TRAIN:])
    write_model(out / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path, help="folder to write, for example build/demo-text")
    out = parser.parse_args().out
    try:
        write_demo(out)
    except OSError as error:
        sys.exit(f"cells.py: error: cannot write {str(out)!r} ({error}); give a folder that can be written")
    print(f"data: {out / 'train.json'}, {out / 'eval.json'}; model: {out / 'model'}")
