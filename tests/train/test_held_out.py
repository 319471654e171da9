"""The held-out loss by data set and modality: against torch's cross entropy, and on several ranks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmfn
from mmfn.batch import IGNORE, in_floats
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.layout import Layout
from mmfn.parallel.mesh.virtual import virtual
from mmfn.train.build.run import Run, prepare
from mmfn.train.config.load import load_config
from mmfn.train.data import Dataset
from mmfn.train.data.dataset import Subset
from mmfn.train.forward import Forward
from mmfn.train.run.held_out import LossSums, held_out_loss, set_names, shares


@pytest.fixture
def run(make_config: Callable[..., Path]) -> Run:
    return prepare(load_config(make_config({"data.check": "first"})), say=lambda text: None)


def talks(folder: Path, name: str, num: int) -> Path:
    """Conversations without media."""
    entries = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i} it is"}]}
        for i in range(num)
    ]
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(entries))
    return folder / name


def several(run: Run, tmp_path: Path) -> Dataset:
    """Images and text, and two sets of one name."""
    paths = [talks(tmp_path / "a", "text.json", 3), talks(tmp_path / "b", "text.json", 4)]
    held_out = run.held_out.subsets[0]
    return Dataset([replace(held_out, max_samples=5), *(Subset(path=path) for path in paths)], run.processor)


def expected(run: Run, data: Dataset) -> LossSums:
    """Sample by sample."""
    names, found = ["eval.json/image", "text.json#1/text", "text.json#2/text"], LossSums()
    for i in range(len(data)):
        key = names[data.records.locate(i)[0]]
        sample = data.sample(i)
        (batch,) = run.loader.pack([sample])
        logits_TV = mmfn.logits(run.model, in_floats(batch))[: len(sample.tokens_T)]
        labels_T = sample.labels_T[1:]
        value = torch.nn.functional.cross_entropy(logits_TV[:-1], labels_T, reduction="sum").item()
        before = found.get(key, (0.0, 0))
        found[key] = before[0] + value, before[1] + int((labels_T != IGNORE).sum())
    return found


def test_losses_by_set_and_modality(run: Run, tmp_path: Path) -> None:
    data = several(run, tmp_path)
    want = expected(run, data)
    assert set_names(data)[1:] == ["text.json#1", "text.json#2"]

    def measure(axis: Axis, batch_samples: int) -> LossSums:
        return held_out_loss(replace(Forward.of(run.model), axis=axis), data, batch_samples=batch_samples)

    for found in [
        measure(Axis(name="world"), 100),
        measure(Axis(name="world"), 5),
        *virtual(Layout(dp=5), lambda mesh: measure(mesh["world"], 2)),  # 12 entries: some ranks have 2, some 3
    ]:
        assert [*found] == [*want]
        for key, (value, number) in want.items():
            assert found[key] == (pytest.approx(value, rel=1e-5), number)


@pytest.mark.parametrize(("num", "at_once", "size"), [(7, 2, 3), (1, 4, 3), (0, 2, 2), (8, 2, 4), (9, 100, 2)])
def test_ranks_have_equally_many_batches_and_every_entry_once(num: int, at_once: int, size: int) -> None:
    parts = [list(shares(num, at_once, Axis(name="world", size=size, index=i))) for i in range(size)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(num))
    assert all(len(batch) <= at_once for part in parts for batch in part)
