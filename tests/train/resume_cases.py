"""Runs that are ended on their way and go on, in one process, and what two runs must have in common."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from mmfn.parallel.mesh.launch import Place
from mmfn.parallel.mesh.layout import Mesh, single_mesh
from mmfn.parallel.mesh.virtual import virtual
from mmfn.train.build.run import prepare
from mmfn.train.checkpoint import format, open_checkpoint
from mmfn.train.config.load import Loaded
from mmfn.train.run.progress import Progress, format_duration
from mmfn.train.run.record import OF_MACHINE as TIMES
from mmfn.train.run.resume import is_restored
from mmfn.train.run.training import run_training
from tests.train.rank_cases import MakeConfig

STEPS, EVERY = 7, 2


class Stopped(Exception):  # noqa: N818  # no error: the run is told to end
    """What ends a run from outside."""


class Stopping(Progress):
    """Ends the run in the middle, when the record of step `stop` is shown."""

    stop = 0

    def show(self, record: Any, terms: Any = ()) -> None:
        if record["step"] == self.stop:
            raise Stopped
        super().show(record, terms)


def faulty(small_demo: Path, full_demo: Path, folder: Path) -> Path:
    """The small demo with two entries that cannot be used."""
    shutil.copytree(full_demo / "images", folder / "images")
    entries = json.loads((small_demo / "train.json").read_text())
    (folder / entries[5]["images"][0]).unlink()
    entries[40]["messages"] = entries[40]["messages"][:-1]
    (folder / "train.json").write_text(json.dumps(entries))
    return folder / "train.json"


def run(loaded: Loaded, stop: int = 0) -> str:
    """Train, on all ranks of a layout; what was said."""
    stream = io.StringIO()

    def rank(mesh: Mesh) -> None:
        place = Place(device=torch.device("cpu"), mesh=mesh, host=mesh)
        progress = Stopping(num_steps=STEPS, log_every=100, stream=stream)
        progress.stop = stop
        has_state = is_restored(loaded, mesh["world"])
        run_training(prepare(loaded, lambda text: None, place, is_restored=has_state), progress)

    sizes = loaded.config.layout.sizes
    if sizes.world == 1:
        rank(single_mesh())
    else:
        virtual(sizes, rank)
    return stream.getvalue()


def metrics(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def state(folder: Path, step: int) -> dict[str, bytes]:
    """All slices of a checkpoint of the run, by file and leaf, as bytes, and its cursor."""
    checkpoint = open_checkpoint(folder / "state" / format.folder_name(step))
    manifest = checkpoint.manifest
    found = {"cursor": json.dumps(dict(manifest.facts.cursor), sort_keys=True).encode()}
    for name, file in manifest.files.items():
        data = (checkpoint.folder / name).read_bytes()
        for path, chunk in format.chunks_in(data[: file.head_bytes]).items():
            found[f"{path} in {name}"] = data[chunk.begin : chunk.begin + chunk.num_bytes]
    return found


def report(folder: Path) -> list[tuple[str, str]]:
    """What the report of a run says, but for times, memory and paths. Its time is that of all of its steps."""
    steps = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    page = (folder / "report.html").read_text(encoding="utf-8")
    facts = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", page)
    tiles = [(name, value) for value, name in re.findall(r"<b>([^<]*)</b><span class=.soft.>([^<]*)</span>", page)]
    charts = re.findall(r'<div class="panel"><span class="soft">(.*?)</span>(<svg.*?</svg>)', page)
    assert dict(tiles)["time of steps"] == format_duration(sum(json.loads(step)["step_s"] for step in steps))
    assert len(facts) > 8
    assert len(charts) > 5
    others = re.compile(r"time|per second|TFLOP|MFU|waiting|step, s|memory|checkpoint|adapter")
    return [(name, value) for name, value in (*tiles, *facts, *charts) if not others.search(name)]


def check_same(folder: Path, other: Path, num_steps: int = STEPS) -> None:
    assert metrics(folder) == metrics(other)
    assert len(metrics(folder)) == num_steps
    assert report(folder) == report(other)
    assert (folder / "skipped.jsonl").read_text() == (other / "skipped.jsonl").read_text()
    assert state(folder, num_steps) == state(other, num_steps)
    for kind in ("checkpoint", "adapter"):
        for path in (folder / kind).glob("*.safetensors"):
            assert path.read_bytes() == (other / kind / path.name).read_bytes(), path.name
    assert list((folder / "checkpoint").glob("*.safetensors"))


def config_of(make_config: MakeConfig, small_demo: Path, full_demo: Path, folder: Path) -> Path:
    """A short run on data with bad samples, saved behind every second step."""
    data = faulty(small_demo, full_demo, folder / "data")
    return make_config(
        {
            "data.train": str(data), "data.root": str(data.parent), "data.eval": None, "data.check": "first",
            "data.max_bad_share": 0.1, "train.steps": STEPS, "checkpoint.every": EVERY,
        }
    )  # fmt: skip
