"""A run over damaged and hostile data goes on: of every row a sample or one line of the ledger, whoever reads it."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

import mmfn
from mmfn.train.build.processor import load_model_processor
from mmfn.train.data import Dataset, Loader, Workers
from mmfn.train.data.skips import Ledger, Skip
from tests.train.data import fuzz_media, test_rows_fuzz
from tests.train.data.test_heard import write_model

pytest.importorskip("av", reason="PyAV is an optional dependency")
STEP, GOOD_EVERY = 16, 10
NUMBERS = [pytest.param(240, id="sampled"), pytest.param(2000, id="all", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def hearing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hearing") / "model")


def write_set(folder: Path, number: int) -> Path:
    """So many rows that are damaged, media or row, and a whole one between them."""
    for name in ("root", "outside"):
        (folder / name).mkdir()
    draw, lines = random.Random(0), []
    media = fuzz_media.cases(folder)
    draw.shuffle(media)
    for place, (_, kind, name, data) in enumerate(media[:number]):
        if place % GOOD_EVERY == 0:
            lines.append(json.dumps(test_rows_fuzz.GOOD).encode())
        if place % 4 == 0:
            lines.append(test_rows_fuzz.fuzz(draw))
            continue
        if data is not None:
            name = f"{place}-{Path(name).name}"  # a file of its own
            (folder / "root" / name).write_bytes(data)
        part = {"type": kind, kind: name}
        talk = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]
        lines.append(json.dumps({"id": f"m{place}", "messages": talk}).encode())
    path = folder / "root" / "set.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def steps_of(path: Path, model: Path, workers: Workers, **batch: Any) -> tuple[int, list[tuple[int, Skip]], int]:
    """Samples, skips by step, and rows, of one epoch, or of as much of it as whole steps take."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    family = mmfn.models.family(config["model_type"])
    cfg = family.config_from_hf(config)
    data = Dataset(path, load_model_processor(str(model)), limits=fuzz_media.LIMITS, cache_bytes=0)
    loader = Loader(
        data,
        lambda samples, sizes: family.pack(samples, cfg, sizes),
        family.towers(cfg),
        token_buckets=[2048],
        tower_buckets={name: [kind.inputs * 2**9] for name, kind in family.towers(cfg).items()},
        seed=0,
        max_bad_share=1.0,
        workers=workers,
        **batch,
    )
    samples, skips = 0, []
    for step, agreed in enumerate(loader.steps(-(-len(data) // STEP)), start=1):
        samples += agreed.counts.samples
        skips += [(step, skip) for skip in agreed.skips]
    return samples, skips, len(data)


@pytest.mark.skipif(os.name != "posix", reason="the hostile files are POSIX's")
@pytest.mark.parametrize("number", NUMBERS)
def test_every_row_is_a_sample_or_in_the_ledger(tmp_path: Path, hearing_model: Path, number: int) -> None:
    path = write_set(tmp_path, number)
    samples, skips, size = steps_of(path, hearing_model, Workers(number=2), batch_samples=STEP)
    places = [skip.place for _, skip in skips if skip.place < size]
    assert len(set(places)) == len(places)
    again = STEP * -(-size // STEP) - size  # places of the next epoch that the last step takes
    assert samples + len(skips) == size + again
    assert samples >= number // GOOD_EVERY
    assert len(skips) > number // 2
    ledger = Ledger(tmp_path / "skipped.jsonl")
    for step, skip in skips:
        ledger.write(step, [skip])
    lines = [json.loads(line) for line in ledger.path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(skips)
    assert all(line["reason"] and line["row"].startswith(f"'{path}', line ") for line in lines)
    alone = steps_of(path, hearing_model, Workers(number=0), batch_samples=STEP)
    assert alone == (samples, skips, size)
