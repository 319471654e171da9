"""Several processes that write one model: the bytes of one, and what is left when one of them dies or cannot write."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

import mmfn
from mmfn import cli, lora
from mmfn.interop import export, weight_files
from mmfn.interop.hf import checkpoint_contents
from mmfn.parallel.mesh.launch import Place, is_lost
from mmfn.parallel.mesh.layout import Layout, distributed_mesh
from mmfn.parallel.weights.sharding import shard_params
from mmfn.train.run import save
from tests import tiny
from tests.interop import whole_export
from tests.train.test_processes import ROOT, finish, start
from tests.train.test_save import model_of

RANKS = 4


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(rank: int, folder: str, dies: int | None) -> None:
    """One rank of four with its shards of a model with adapters; `dies`: the one that is killed in its first leaf."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh = distributed_mesh(Layout(dp=RANKS, ep=2))
    model = model_of("moe", torch.float32)
    specs = tiny.TRAINED["lora"](model.family, model.cfg)
    params = shard_params(tiny.with_adapters(model.params, specs), specs, mesh)
    place = Place(device=torch.device("cpu"), mesh=mesh, host=mesh)
    what = checkpoint_contents(mmfn.Model(**{**vars(model), "params": lora.without_adapters(params)}))
    if rank == dies:
        weight_files.os.pwrite = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    try:
        world = mesh["world"]
        export.save(
            Path(folder) / "out", what, save.shard_pieces(params, what, place), save.writers_of(world, Path(folder))
        )
    except RuntimeError as error:
        if dies is None or not is_lost(error):
            raise
        (Path(folder) / f"lost {rank}").touch()
        os._exit(0)  # as a command ends
    dist.destroy_process_group()


@pytest.mark.dist
def test_real_ranks_write_the_files_of_one_process(tmp_path: Path) -> None:
    spawn(write, (str(tmp_path), None), RANKS)
    model = model_of("moe", torch.float32)
    specs = tiny.TRAINED["lora"](model.family, model.cfg)
    merged = lora.merge(tiny.with_adapters(model.params, specs))
    tensors = whole_export.tensors_of(mmfn.Model(**{**vars(model), "params": merged}), "hub")
    whole_export.write(tmp_path / "want", tensors, 5_000_000_000)
    (found,), (want,) = (list(whole_export.content(tmp_path / name).values()) for name in ("out", "want"))
    assert len(found) == len(want)
    length = 8 + int.from_bytes(want[:8], "little")
    assert found[:length] == want[:length]
    values = [torch.frombuffer(bytearray(data[length:]), dtype=torch.float32) for data in (found, want)]
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize("dies", [0, 3])
def test_a_rank_that_dies_leaves_the_earlier_export(dies: int, tmp_path: Path) -> None:
    mmfn.save_hf(tmp_path / "out", model_of("moe", torch.float32))
    before = content(tmp_path / "out")
    ranks = spawn(write, (str(tmp_path), dies), RANKS, join=False)  # type: ignore[no-untyped-call]
    for process in ranks.processes:
        process.join(900)
    codes = [process.exitcode for process in ranks.processes]
    assert codes == [-signal.SIGKILL if rank == dies else 0 for rank in range(RANKS)]
    assert len(list(tmp_path.glob("lost *"))) == RANKS - 1
    assert content(tmp_path / "out") == before
    assert mmfn.load_hf(tmp_path / "out")


@pytest.mark.dist
def test_a_run_of_processes_is_exported_as_it_ended(make_config: Callable[..., Path], tmp_path: Path) -> None:
    path = make_config({"data.eval": None, "data.check": "first", "train.steps": 2, "checkpoint.every": 2})
    for code, _, errors in finish(start(2, "train", str(path), "layout.dp=2")):
        assert (code, errors) == (0, "")
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert content(tmp_path / "out") == content(tmp_path / "run" / "checkpoint")


def limited(*args: str, size: int) -> "subprocess.CompletedProcess[str]":
    """A command in a process that may write files of `size` bytes at most."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "mmfn", *args],
        env=env, capture_output=True, text=True, timeout=900,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize("action", ["hf-to-dcp", "dcp-to-hf"])
def test_a_disk_that_takes_no_more_is_one_sentence(action: str, tmp_path: Path) -> None:
    mmfn.save_hf(tmp_path / "model", model_of("glm", torch.float32))
    assert cli.main(["convert", "hf-to-dcp", str(tmp_path / "model"), str(tmp_path / "dcp")]) == 0
    source = ("dcp", "--model", str(tmp_path / "model")) if action == "dcp-to-hf" else ("model",)
    names = (str(tmp_path / source[0]), str(tmp_path / "out"), *source[1:])
    ended = limited("convert", action, *names, size=60_000)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("mmfn: error: [Errno 27] File too large")
    assert ended.stderr.count("\n") == 1
    assert str(tmp_path / "out") in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "model"]


def test_a_folder_that_may_not_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mmfn.save_hf(tmp_path / "model", model_of("dense", torch.float32))

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError(30, "Read-only file system", f"{tmp_path}/.out.abc")

    monkeypatch.setattr(export.tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(export.tempfile, "TemporaryDirectory", refuse)
    assert cli.main(["convert", "hf-to-dcp", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said == f"mmfn: error: [Errno 30] Read-only file system (.out.abc): '{tmp_path / 'out'}'\n"
