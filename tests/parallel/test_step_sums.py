"""What a step sums over ranks: exact counts and the norm, on ranks that add up float64 and on those that do not."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmfn.parallel.mesh.layout import Layout, Mesh, make_mesh, process_groups
from mmfn.parallel.mesh.step_sums import all_counts, digits, norm_and_sums, numbers
from mmfn.parallel.mesh.virtual import virtual
from mmfn.parallel.planning.alike import Alike
from mmfn.parallel.planning.trace import Recorder

COUNT = 2**24 + 1  # which float32 does not hold


@dataclass(frozen=True)
class Narrow(Alike):
    """Ranks that hold equal values and add up float32 alone, in float32 at every step."""

    widest = torch.float32

    def all_reduce(self, x: Tensor, site: str) -> Tensor:
        assert x.dtype == torch.float32
        total = x
        for _ in range(self.size - 1):
            total = total + x
        return total


def narrow_mesh(layout: Layout) -> Mesh:
    recorder = Recorder(is_fake=False)
    return make_mesh(layout, 0, lambda name, groups: Narrow(recorder, name, 0, len(groups[0])))


@pytest.mark.parametrize("layout", [Layout(dp=3), Layout(replicate=2, dp=2), Layout(dp=64), Layout(dp=512)], ids=str)
@pytest.mark.parametrize("count", [0, 1, COUNT, 123_456_789_012, 2**44 - 1])
def test_counts_are_exact_where_ranks_add_up_float32(layout: Layout, count: int) -> None:
    shares = {"tokens": torch.tensor(count), "loss": torch.tensor(0.5), "dropped": torch.tensor(7, dtype=torch.int32)}
    shares["counts_E"] = torch.tensor([[3, count]])
    norm, sums = norm_and_sums(torch.tensor(3.0), shares, narrow_mesh(layout))
    assert (sums["tokens"].item(), sums["tokens"].dtype) == (layout.world * count, torch.int64)
    assert (sums["dropped"].item(), sums["dropped"].dtype) == (layout.world * 7, torch.int32)
    assert (sums["loss"].item(), sums["loss"].dtype) == (layout.world * 0.5, torch.float32)
    assert sums["counts_E"].tolist() == [[layout.world * 3, layout.world * count]]
    torch.testing.assert_close(norm, torch.tensor(3.0 * layout.shard**0.5))


def test_counts_of_virtual_ranks_are_exact() -> None:
    def run(mesh: Mesh) -> tuple[Tensor, dict[str, Tensor]]:
        return norm_and_sums(torch.tensor(1.0), {"tokens": torch.tensor(COUNT + mesh["world"].index)}, mesh)

    for norm, sums in virtual(Layout(replicate=2, dp=2), run):
        assert sums["tokens"].item() == 4 * COUNT + 6
        assert norm == 2**0.5


def test_ranks_with_different_micro_batches_are_told_so() -> None:
    """In the words of who gave them, not of the collective that notices."""
    for sizes in (((1, 4), (2, 4)), ((2, 4), (2, 3))):  # micro-batches and segments of two ranks
        (a, n), (b, m) = sizes
        message = rf"different micro-batches: {a} of {n} on rank 0, {b} of {m} on rank 1 .* packed for one"
        with pytest.raises(ValueError, match=message):
            virtual(Layout(dp=2), partial(exchange_counts, sizes))


def exchange_counts(sizes: Sequence[tuple[int, int]], mesh: Mesh) -> None:
    all_counts(torch.ones(sizes[mesh["dp"].index]), mesh)


def test_digits_and_the_number_they_are() -> None:
    assert digits(torch.tensor(2**22 + 3), num_ranks=4).tolist() == [3, 1, 0]
    for num_ranks in (1, 2, 3, 4096, 100_000):
        for count in (0, 5, COUNT, 2**53 - 1):
            assert numbers(digits(torch.tensor(count), num_ranks), num_ranks).item() == count


@pytest.mark.parametrize(("backend", "widest"), [("gloo", torch.float64), ("hccl", torch.float32)])
def test_a_backend_says_what_it_adds_up(backend: str, widest: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def new_subgroups(ranks: list[list[int]], timeout: Any, backend: str | None) -> Any:
        return SimpleNamespace(group_name="group", size=lambda: len(ranks[0])), None

    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", new_subgroups)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    assert make_mesh(Layout(dp=2), 0, process_groups())["world"].widest == widest
    assert make_mesh(Layout(dp=2), 0, process_groups(backend="gloo"))["world"].widest == torch.float64
