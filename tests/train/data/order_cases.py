"""Data with everything that goes wrong, and digests of the batches made of them; as a program, those of one rank."""

import hashlib
import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

from mmfn import rng, tree
from mmfn.batch import IGNORE, IMAGE, Batch, Media, Sample
from mmfn.models.layers.patches import lay_frames, tower_kind
from mmfn.packing import Sizes, pack
from mmfn.parallel.mesh import launch
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.mesh.virtual import virtual
from mmfn.train.data import Agreed, Loader, Workers
from mmfn.train.data.bad import BadSample
from mmfn.train.data.cursor import Cursor
from mmfn.train.data.sources.mixing import Epochs

VALUES = 3
TOWERS = {"vision": tower_kind(merge_size=2, num_values=VALUES, matmul_patches=40)}
MODES: dict[str, dict[str, Any]] = {
    "samples": {"batch_samples": 6, "token_buckets": [32, 64], "tower_buckets": {"vision": [32, 128]}},
    "tokens": {"batch_tokens": 256, "token_buckets": [32, 64], "tower_buckets": {"vision": [32, 128]}},
}


class Data:
    """Samples of 6 to 70 tokens, a third of them without an image.

    Of 97 entries some are broken as far as anybody can see (`measure` knows), some only once their media are read, one
    has nothing to learn, and those of more than 64 tokens are too long; half of these can be cut.
    """

    fingerprints = ("made of nothing",)

    def __init__(self, size: int = 97) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def order(self, seed: int) -> Epochs:
        return Epochs(self.size, seed)

    def place(self, index: int) -> str:
        return f"'made.jsonl', line {index + 1}"

    def measure(self, index: int) -> Sample:
        if index % 31 == 5:
            raise BadSample(f"s{index}", self.place(index), "its image is missing; restore it")
        return self._sample(index, 6 + 64 * (index * index % 97) // 96)

    def sample(self, index: int) -> Sample:
        if index % 41 == 7:
            raise BadSample(f"s{index}", self.place(index), "its image ends early; restore it")
        return self.measure(index)

    def beginnings(self, index: int, *, is_measured: bool) -> Iterator[Sample]:
        if index % 2:
            yield from (self._sample(index, length) for length in (66, 40))

    def _sample(self, index: int, num_tokens: int) -> Sample:
        num_patches = 4 * min(num_tokens // 2, index * 5 % 17) if index % 3 else 0
        kinds_T = torch.zeros(num_tokens, dtype=torch.int64)
        kinds_T[1 : 1 + num_patches // 4] = IMAGE
        tokens_T = torch.arange(num_tokens) + 100 * index
        labels_T = torch.where((torch.arange(num_tokens) >= num_tokens - 2) & (index != 50), tokens_T, IGNORE)
        patches_PF = torch.randn(num_patches, VALUES, generator=rng.generator(0, index))
        images = (Media(inputs_UF=patches_PF, grid=(1, 2, num_patches // 2)),) if num_patches else ()
        return Sample(tokens_T=tokens_T, labels_T=labels_T, kinds_T=kinds_T, images=images, id=f"s{index}")


def pack_samples(samples: list[Sample], sizes: Sizes) -> Batch:
    positions = [torch.arange(s.tokens_T.numel()).expand(3, -1).float() for s in samples]
    return pack(samples, positions, [{"vision": lay_frames(s, 2, VALUES)} for s in samples], TOWERS, sizes)


def make_loader(mode: str, axis: Axis | None = None, workers: Workers | None = None, **change: Any) -> Loader:
    options = {"seed": 3, "long_samples": "cut", "max_bad_share": 1.0, "dataset": Data(), **MODES[mode], **change}
    return Loader(
        options.pop("dataset"), pack_samples, TOWERS,
        axis=axis or Axis(name="batch"), workers=workers or Workers(number=0), **options,
    )  # fmt: skip


def digest(*values: Any) -> str:
    state = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            state.update(f"{value.dtype}{list(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        else:
            state.update(repr(value).encode())
    return state.hexdigest()[:16]


def batch_digest(batch: Batch) -> str:
    """Of all that is in a micro-batch."""
    return digest(*tree.leaves(batch))


def sample_digests(batch: Batch) -> list[str]:
    """Of each sample in it, wherever it lies."""
    tower = batch.towers["vision"]
    rows = tower.inputs_UF.shape[0] // tower.ids_P.shape[0]
    found = []
    for n in batch.segment_T.unique().tolist():
        if n == batch.num_segments:
            continue
        is_its_T = batch.segment_T == n
        ids_T = batch.token_ids_T[is_its_T]
        is_its_P = (tower.ids_P >> 32 == ids_T[0] >> 32) & (tower.ids_P >= 0)
        tokens = (batch.tokens_T[is_its_T], batch.labels_T[is_its_T], batch.positions_3T[:, is_its_T])
        found.append(
            digest(ids_T, *tokens, tower.inputs_UF[is_its_P.repeat_interleave(rows)], tower.coords_P4[is_its_P])
        )
    return found


def step_digest(agreed: Agreed, mode: str) -> dict[str, Any]:
    """What a rank computes of a step, and what all ranks know of it."""
    of_batch = sample_digests if mode == "samples" else lambda batch: [batch_digest(batch)]
    own = [
        one for batch in agreed.microbatches if mode == "tokens" or batch.segments.longest for one in of_batch(batch)
    ]
    counts = [agreed.counts.samples, agreed.counts.tokens, agreed.counts.supervised_tokens, agreed.counts.cut]
    return {"own": own, "counts": counts, "skips": [repr(skip) for skip in agreed.skips], "cursor": repr(agreed.cursor)}


def joined(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Steps of all ranks together: what is computed in whichever order, and what all of them know alike."""
    steps = []
    for parts in zip(*ranks, strict=True):
        assert all({**part, "own": 0} == {**parts[0], "own": 0} for part in parts)
        steps.append({**parts[0], "own": sorted(one for part in parts for one in part["own"])})
    return steps


def run(
    mode: str, stop: int, *, ranks: int = 1, workers: Workers | None = None, state: Any = None, **change: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Steps up to `stop`, from the state of an earlier run, on so many ranks; and the state behind them."""

    def work(axis: Axis) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        loader = make_loader(mode, axis, workers, **change)
        cursor: Cursor | None = loader.resume(state) if state is not None else None
        done = []
        for agreed in loader.steps(stop, cursor):
            done.append(step_digest(agreed, mode))
            cursor = agreed.cursor
        return done, loader.state(cursor or Cursor())

    found = virtual(Layout(dp=ranks), lambda mesh: work(mesh["batch"]))
    assert all(other == found[0][1] for _, other in found)
    return joined([steps for steps, _ in found]), json.loads(json.dumps(found[0][1]))


def main(mode: str, stop: str, dp: str) -> None:
    """The digests of this process, one of those that torchrun's variables describe, as JSON."""
    layout, ranks = Layout(dp=int(dp)), launch.join()
    with launch.placed(ranks, layout, torch.device("cpu"), timedelta(minutes=2).total_seconds()) as place:
        loader = make_loader(mode, place.host["batch"], Workers(number=2, ahead=3))
        json.dump([step_digest(agreed, mode) for agreed in loader.steps(int(stop))], sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
