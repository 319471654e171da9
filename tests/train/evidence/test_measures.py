"""What the stages measure with: inputs for transformers, differences of steps and of files, processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmfn.interop.inputs import samples_from_hf
from mmfn.train.evidence.equality import difference
from mmfn.train.evidence.files import newest, tensors_apart
from mmfn.train.evidence.library import inputs_of
from mmfn.train.evidence.processes import start
from tests import tiny
from tests.train.processes import ROOT

NAMES = [name for name in tiny.TINY if name not in ("small", "toy")]


@pytest.mark.parametrize("name", NAMES)
def test_inputs_for_transformers_are_read_back_as_the_sample(name: str) -> None:
    """Images, videos and sound of any sizes, several in a row."""
    model = tiny.model_of(name)
    seen = set()
    for sample in tiny.random_samples(model, 5, 12):
        (back,) = samples_from_hf(inputs_of(sample, model), model)
        assert torch.equal(back.tokens_T, sample.tokens_T)
        assert torch.equal(back.kinds_T, sample.kinds_T)
        for kind in ("images", "videos", "audios"):
            media, again = getattr(sample, kind), getattr(back, kind)
            assert [one.grid for one in media] == [one.grid for one in again]
            for one, other in zip(media, again, strict=True):
                frames = one.grid[0] if kind == "audios" else len(one.inputs_UF)
                assert torch.equal(one.inputs_UF[:frames], other.inputs_UF[:frames])
                seen.add(kind)
    assert seen == {{1: "images", 2: "videos", 3: "audios"}[kind] for kind in tiny.media_kinds(model.family, model.cfg)}


def test_a_difference_is_relative_to_the_largest_value_of_its_tensor() -> None:
    want = {
        "loss/1": torch.tensor(2.0),
        "loss/2": torch.tensor(4.0),
        "params/a": torch.tensor([100.0, 1.0]),
        "params/b": torch.tensor([0.0, 1e-9]),
        "params/c": torch.zeros(0),
    }
    found = {**want, "loss/2": torch.tensor(5.0), "params/a": torch.tensor([100.0, 2.0])}
    assert difference(want, want) == {"loss": 0.0, "params": 0.0}
    assert difference(found, want) == {"loss": 0.25, "params": pytest.approx(0.01)}
    tiny_leaf = difference({**want, "params/b": torch.zeros(2)}, want)
    assert tiny_leaf["params"] == pytest.approx(1e-9 / (1e-6 * 100)), "rounding of what is 0 is no difference"
    with pytest.raises(ValueError, match=r"params/d is there on a mesh or on one device alone"):
        difference({**want, "params/d": torch.zeros(1)}, want)


def test_tensors_that_are_not_the_same_bytes_are_counted(tmp_path: Path) -> None:
    values = {"a": torch.tensor([0.0, float("nan")]), "b": torch.arange(3), "c": torch.tensor(1.0)}
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        save_file(values, tmp_path / name / "model.safetensors")
    one, other = tmp_path / "one", tmp_path / "other"
    assert tensors_apart(one, other) == 0
    changed = {"a": torch.tensor([-0.0, float("nan")]), "b": torch.arange(3).int(), "d": torch.tensor(1.0)}
    save_file(changed, other / "model.safetensors")
    assert tensors_apart(one, other) == 4, "another zero, another dtype, and a name in each that the other has not"
    save_file({"e": torch.ones(1)}, other / "more.safetensors")
    assert tensors_apart(one, other) == tensors_apart(other, one) == 5
    with pytest.raises(ValueError, match="holds no safetensors; the run that writes them is not complete"):
        tensors_apart(one, tmp_path)
    assert newest(tmp_path) == 0


def test_of_several_processes_the_error_of_one_is_said() -> None:
    code = "import os, sys; print('hi'); sys.exit(os.environ['RANK'] == '1' and 'mmfn: error: rank 1')"
    with (
        start([sys.executable, "-c", code], "it", world=2) as ranks,
        pytest.raises(ValueError, match=r"^it failed: rank 1$"),
    ):
        ranks.wait()
    with start([sys.executable, "-c", "print('hi')"], "it") as alone:
        alone.wait()
        assert alone.last_words() == "hi"


ENDED = """
import sys, time
from mmfn.errors import Stop
from mmfn.train.evidence.processes import start

try:
    with start([sys.executable, "-c", "import time; time.sleep(600)"], "a command", 2) as processes:
        print(*(rank.pid for rank in processes.ranks), flush=True)
        processes.wait()
except Stop as stop:
    sys.exit(stop.code)
"""


def test_processes_are_killed_also_when_their_parent_is_asked_to_end() -> None:
    """As `mmfn verify` by SIGTERM."""
    with subprocess.Popen([sys.executable, "-c", ENDED], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.terminate()
        assert parent.wait() == 143
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processes_are_killed_also_when_the_block_fails() -> None:
    with start([sys.executable, "-c", "import time; time.sleep(600)"], "it", world=2) as first:
        assert first.is_running()
        first.kill()
        with pytest.raises(ValueError, match=r"^it failed: it printed nothing$"):
            first.wait()
    with (
        pytest.raises(RuntimeError, match="stop"),
        start([sys.executable, "-c", "import time; time.sleep(600)"], "it") as second,
    ):
        raise RuntimeError("stop")
    assert [rank.returncode for rank in (*first.ranks, *second.ranks)] == [-9, -9, -9]
