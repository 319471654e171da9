"""Runs that are killed again and again: each goes on as if it had not been, bit for bit.

    python -m tests.train.checkpoint.campaign --kills 300             # all cases, one process and 4 gloo ranks
    python -m tests.train.checkpoint.campaign --kills 20 --case "images, 4 ranks"

For every case one run is left alone. Others get SIGKILL, on one rank or on all, at a random moment, while they start,
or before, behind or in the middle of a call to the operating system that is drawn (most of which a save makes). Behind
each kill what is on disk is compared with the run that was left alone: the newest checkpoint must be whole, and none
older than one seen before; equal in every byte of parameters, optimizer, guard and cursor; the log and the ledger
up to it as well. A run that gets through is compared as a whole. What is found is printed as a table. Linux.

Ranks are forks of one process that has loaded everything, so that a kill costs little more than the steps behind it.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from mmfn import cli
from mmfn.parallel.mesh.axis import Axis
from mmfn.train.checkpoint import newest
from tests.train.checkpoint.kills import WHERE, Fuse
from tests.train.resume_cases import metrics, state

ROOT = Path(__file__).parents[3]
ALONE = Axis(name="world")
ENTRIES, EVERY = 60, 2
NO_MEDIUM, NO_ANSWER = 5, 40  # entries that cannot be used
PATIENCE_S = 20.0  # for ranks to end behind one that was killed
BASE: dict[str, Any] = {
    "model.init": "random", "data.check": "first", "data.max_bad_share": 0.2, "optimizer.lr": 2e-3,
    "checkpoint.every": EVERY, "checkpoint.keep_last": 2, "output.path": "",
}  # fmt: skip
WINDOWS = {"data.window_samples": 24}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A demo of `examples/`, how its samples are packed, and on how many ranks."""

    demo: str
    settings: dict[str, Any]
    ranks: int = 1


CASES = {
    "images": Case(
        demo="digits",
        settings={"data.batch_samples": 4, "data.token_buckets": [192], "data.tower_buckets": {"vision": [64]}}
        | {"train.spike_window": 4, "optimizer.ema_decay": 0.9, "output.weights": "ema"},
    ),
    "images, 4 ranks": Case(
        demo="digits",
        settings={"data.batch_samples": 8, "data.token_buckets": [64, 128], "data.tower_buckets": {"vision": [64]}}
        | {"layout.dp": 2, "layout.cp": 2, "train.spike_window": 4},
        ranks=4,
    ),
    "sound, experts": Case(
        demo="dtmf",
        settings={"data.batch_samples": 4, "data.token_buckets": [256]}
        | {"data.tower_buckets": {"vision": [4], "audio": [400]}, "model.dtype": "bfloat16"},
    ),
    "sound, experts, 4 ranks": Case(
        demo="dtmf",
        settings={"data.batch_samples": 8, "data.token_buckets": [128]}
        | {"data.tower_buckets": {"vision": [4], "audio": [200]}, "layout.dp": 4, "layout.ep": 2},
        ranks=4,
    ),
    "video, packed by tokens": Case(
        demo="moving_digits",
        settings={"data.batch_tokens": 640, "data.token_buckets": [640], "data.tower_buckets": {"vision": [320]}}
        | WINDOWS
        | {"optimizer.kind": "muon"},
    ),
    "video, packed by tokens, 4 ranks": Case(
        demo="moving_digits",
        settings={"data.batch_tokens": 1280, "data.token_buckets": [320], "data.tower_buckets": {"vision": [160]}}
        | WINDOWS
        | {"layout.dp": 4},
        ranks=4,
    ),
}


@dataclass(kw_only=True)
class Tally:
    """What was done and found. `how`: kills by kind. `wrong`: one sentence each."""

    kills: int = 0
    how: Counter[str] = field(default_factory=Counter)
    leftovers: int = 0
    finished: int = 0
    steps: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def write_demo(name: str, folder: Path) -> Path:
    """Few samples of a demo, two of which cannot be used."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "examples"))
    spec.loader.exec_module(module)
    module.write_demo(folder)
    entries = json.loads((folder / "train.json").read_text())[:ENTRIES]
    medium = next(entries[NO_MEDIUM][key] for key in ("images", "audios", "videos") if key in entries[NO_MEDIUM])
    medium[0] += ".missing"
    entries[NO_ANSWER]["messages"] = entries[NO_ANSWER]["messages"][:-1]
    (folder / "train.json").write_text(json.dumps(entries))
    return folder


def write_config(case: Case, demo: Path, path: Path, num_steps: int) -> Path:
    """The config of a run."""
    flat = BASE | case.settings | {"train.steps": num_steps, "model.path": str(demo / "model")}
    flat |= {"data.train": str(demo / "train.json")}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    path.write_text(yaml.safe_dump(nested))
    return path


@dataclass(frozen=True, kw_only=True)
class Command:
    """`mmfn train` of a config on some ranks."""

    config: Path
    ranks: int

    def start(self, folder: Path, fuses: dict[int, Fuse] | None = None, *more: str) -> list[int]:
        """The processes of a run in `folder`; those with a fuse end by themselves."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        arguments = ["train", str(self.config), f"output.path={folder}", *more]
        return [self._fork(rank, port, arguments, folder, (fuses or {}).get(rank)) for rank in range(self.ranks)]

    def _fork(self, rank: int, port: str, arguments: list[str], folder: Path, fuse: Fuse | None) -> int:
        process = os.fork()
        if process:
            return process
        try:
            log = os.open(folder.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if self.ranks > 1:
                os.environ |= {"WORLD_SIZE": str(self.ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            if fuse is not None:
                fuse.arm()
            code = cli.main(arguments)
            sys.stdout.flush()
            os._exit(code)
        finally:
            os._exit(70)


def wait(processes: Sequence[int]) -> list[int]:
    """Exit codes, those of signals negative, when all have ended.

    As torchrun does, those that a killed one leaves behind are ended: while ranks meet they wait for it for minutes.
    """
    codes: dict[int, int] = {}
    end = float("inf")
    while len(codes) < len(processes):
        for process in [process for process in processes if process not in codes]:
            if time.monotonic() > end:
                os.kill(process, signal.SIGKILL)
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                codes[process] = os.waitstatus_to_exitcode(status)
                end = min(end, time.monotonic() + PATIENCE_S) if codes[process] else end
        time.sleep(0.01)
    return [codes[process] for process in processes]


def log_size(folder: Path) -> int:
    """Of the log of steps."""
    return (folder / "metrics.jsonl").stat().st_size if (folder / "metrics.jsonl").exists() else 0


def are_running(processes: Sequence[int]) -> bool:
    """Whether none of the processes has ended; nothing is collected."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return all(os.waitid(os.P_PID, process, flags) is None for process in processes)


def interrupt(command: Command, folder: Path, draw: random.Random, tally: Tally) -> bool:
    """A run that is killed, or gets through before it is: then True."""
    how = draw.choices(("a call", "a moment", "a start"), (5, 4, 1))[0]
    some = draw.sample(range(command.ranks), draw.choice((1, command.ranks)))
    fuses = {some[0]: Fuse(draw.randint(1, 60), draw.choice(WHERE))} if how == "a call" else {}
    before = log_size(folder)
    processes = command.start(folder, fuses)
    if how == "a moment":
        while log_size(folder) in (0, before) and are_running(processes):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.6))
    elif how == "a start":
        time.sleep(draw.uniform(0, 1.5))
    for rank in some if not fuses else ():
        if are_running([processes[rank]]):
            os.kill(processes[rank], signal.SIGKILL)
    codes = wait(processes)
    if -signal.SIGKILL in codes:
        tally.kills += 1
        tally.how[how] += 1
        return False
    if any(codes):
        log = "; ".join(folder.with_suffix(f".{rank}.log").read_text()[-300:] for rank in range(command.ranks))
        tally.wrong.append(f"exit codes {codes} without a kill: {log}")
    return True


def differences(folder: Path, whole: Path, seen: int, is_over: bool) -> Iterator[str | int]:
    """What is wrong in a folder behind a kill; then the step of its newest checkpoint."""
    root, step = folder / "state", 0
    search = newest(root, ALONE, is_thorough=True)
    if search.skipped:
        yield f"a half-written checkpoint has a name: {search.skipped[0]}"
    if search.checkpoint is not None:
        step = search.checkpoint.manifest.facts.step
        if state(folder, step) != state(whole, step):
            yield f"the state behind step {step} differs"
    if step < seen:
        yield f"the checkpoint of step {seen} is lost, the newest is of step {step}"
    if step:
        last = 10**9 if is_over else step
        for name in ("metrics", "skipped"):
            if lines(folder, name, last) != lines(whole, name, last):
                yield f"{name}.jsonl differs up to step {step}"
    yield step


def lines(folder: Path, name: str, last: int) -> list[Any]:
    """The entries of a log up to a step, without what a kill has cut short behind it."""
    if name == "metrics":
        text = (folder / "metrics.jsonl").read_text()
        if text and not text.endswith("\n"):
            (folder / "metrics.jsonl").write_text(text[: text.rfind("\n") + 1])
        return [record for record in metrics(folder) if record["step"] <= last]
    path, found = folder / "skipped.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return [entry for entry in found if entry["step"] <= last]


def run_case(name: str, kills: int, num_steps: int, seed: int, folder: Path) -> Tally:
    """Kill runs of a case, and compare."""
    case, tally, draw, begun = CASES[name], Tally(steps=num_steps), random.Random(f"{name} {seed}"), time.monotonic()
    demo = write_demo(case.demo, folder / "demo")
    command = Command(config=write_config(case, demo, folder / "config.yaml", num_steps), ranks=case.ranks)
    whole = folder / "whole"
    codes = wait(command.start(whole, None, "checkpoint.keep_last=100000"))
    assert not any(codes), (folder / "whole.0.log").read_text()[-2000:]
    number, seen = 0, 0
    while True:
        broken = folder / f"broken_{number}"
        is_over = (
            interrupt(command, broken, draw, tally) if tally.kills < kills else not any(wait(command.start(broken)))
        )
        tally.leftovers += any(path.name.startswith(".iter_") for path in (broken / "state").glob(".*"))
        *wrong, step = differences(broken, whole, seen, is_over)
        tally.wrong += [f"{broken.name}, behind kill {tally.kills}: {one}" for one in wrong]
        seen = int(step)
        if is_over:
            tally.finished += 1
            if seen != num_steps:
                tally.wrong.append(f"{broken.name} is over behind step {seen}")
            shutil.rmtree(broken)
            number, seen = number + 1, 0
            if tally.kills >= kills:
                break
    tally.seconds = time.monotonic() - begun
    return tally


def table(tallies: dict[str, Tally]) -> str:
    """What was found, as Markdown."""
    head = "| case | kills | in a call / at a moment / at the start | in a save | runs that got through | wrong |"
    rows = [head, "|---|---|---|---|---|---|"]
    for name, one in tallies.items():
        how = " / ".join(str(one.how[kind]) for kind in ("a call", "a moment", "a start"))
        rows.append(f"| {name} | {one.kills} | {how} | {one.leftovers} | {one.finished} | {len(one.wrong)} |")
    total = sum(one.kills for one in tallies.values())
    rows.append(f"| **all** | **{total}** | | | | **{sum(len(one.wrong) for one in tallies.values())}** |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="of all cases together")
    parser.add_argument("--case", action="append", choices=CASES, help="one of them; again for more; default: all")
    parser.add_argument("--ranks", type=int, help="cases on so many ranks alone: 1 or 4")
    parser.add_argument("--steps", type=int, default=40, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to work; default: the folder for temporary files")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # before any fork: the pool is not copied by one
    cli._load("train")
    names = [name for name in args.case or CASES if args.ranks in (None, CASES[name].ranks)]
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for index, name in enumerate(names):
            kills = args.kills * (index + 1) // len(names) - args.kills * index // len(names)
            place = Path(folder) / str(index)
            place.mkdir()
            tallies[name] = run_case(name, kills, args.steps, args.seed, place)
            shutil.rmtree(place)
            print(f"{name}: {tallies[name]}", file=sys.stderr, flush=True)
    print(table(tallies))
    return int(any(one.wrong for one in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
