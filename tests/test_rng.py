"""Keys and generators are functions of their arguments alone."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmfn import rng


def test_keys_differ_by_every_part() -> None:
    parts = [(0,), (1,), (0, 0), (0, "0"), (0, "a", "b"), (0, "ab"), (0, "a", "b", 0), (0, "b", "a"), (0, "", "ab")]
    keys = [rng.key(*p) for p in parts]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)


def test_keys_are_the_same_in_another_process() -> None:
    code = "from mmfn import rng; print(rng.key(3, 7, 'text/embed'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == rng.key(3, 7, "text/embed")


def test_key_is_the_hash_it_claims_to_be() -> None:
    """BLAKE2b over length-prefixed typed parts, written out by hand: stored runs depend on it."""
    import hashlib

    data = b"\x05\x00\x00\x00int:3" + b"\x05\x00\x00\x00str:a"
    expected = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") // 2
    assert rng.key(3, "a") == expected


def test_generator_repeats_and_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    a = torch.randn(4, generator=rng.generator(0, "x"))
    assert torch.equal(a, torch.randn(4, generator=rng.generator(0, "x")))
    assert not torch.equal(a, torch.randn(4, generator=rng.generator(0, "y")))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("size", [0, 1, 257])
def test_permutation(size: int) -> None:
    order = rng.permutation(size, 0, "epoch", 1)
    assert sorted(order) == list(range(size))
    assert order == rng.permutation(size, 0, "epoch", 1)
    if size > 1:
        assert order != rng.permutation(size, 0, "epoch", 2)
        assert order != rng.permutation(size, 1, "epoch", 1)


def chi_square(counts: torch.Tensor, freedom: int) -> float:
    """How many standard deviations counts that should be equal lie above what chance gives."""
    expected = counts.double().mean()
    return (float(((counts - expected) ** 2 / expected).sum()) - freedom) / (2 * freedom) ** 0.5


def turns_of(size: int, num: int) -> torch.Tensor:
    """[num, size]: the first turns of a permutation."""
    order = rng.Permutation(size, 0, "test")
    return order.walk(torch.arange(size * num)).view(num, size)


def test_every_place_has_a_value_of_its_own() -> None:
    for size in range(1, 301):
        assert torch.equal(turns_of(size, 2).sort(dim=1).values, torch.arange(size).expand(2, size))
    for size in (2**16, 2**16 + 1, 99_991):
        assert torch.equal(turns_of(size, 1)[0].sort().values, torch.arange(size))


@pytest.mark.parametrize("size", [2**31 + 11, 2**39 + 1, 2**40 - 1, 2**40])
def test_large_sizes_stay_in_range_and_meet_nowhere(size: int) -> None:
    order = rng.Permutation(size, 5, "x")
    places = torch.cat([torch.arange(50_000), size - 1 - torch.arange(50_000)])
    values = order.at(places)
    assert values.unique().numel() == places.numel()
    assert 0 <= int(values.min()) < size // 1000
    assert size - size // 1000 < int(values.max()) < size


def test_all_orders_of_few_are_equally_likely() -> None:
    for size, num in ((2, 2), (3, 6), (4, 24), (5, 120)):
        turns = turns_of(size, 200 * num)
        _, counts = (turns * size ** torch.arange(size)).sum(1).unique(return_counts=True)
        assert counts.numel() == num
        assert chi_square(counts, num - 1) < 4


@pytest.mark.parametrize("size", [6, 8, 9, 16, 17, 33, 64])
def test_values_and_pairs_are_equally_likely(size: int) -> None:
    turns = turns_of(size, 8 * size * size)
    where = (torch.arange(size) * size + turns).flatten().bincount(minlength=size * size)
    assert chi_square(where, (size - 1) ** 2) < 4
    for other in (1, size // 2, -1):
        pairs = (turns[:, 0] * size + turns[:, other]).bincount(minlength=size * size)
        assert chi_square(pairs.view(size, size)[~torch.eye(size, dtype=torch.bool)], size * (size - 1) - 1) < 4


def test_turns_and_neighbours_of_a_large_set_are_unlike() -> None:
    order = rng.Permutation(10**6, 0, "x")
    values = order.walk(torch.arange(2 * 10**6)).view(2, -1).double()
    together = torch.stack([values[0], values[1], values[0].roll(1)])
    assert (torch.corrcoef(together) - torch.eye(3)).abs().max() < 0.005


def test_permutation_is_a_function_of_its_arguments() -> None:
    order = rng.Permutation(1000, 3, "epoch")
    places = torch.arange(1000)
    assert torch.equal(order.at(places), rng.Permutation(1000, 3, "epoch").at(places))
    assert order.at(places).tolist() == list(order) == [order[i] for i in range(1000)]
    others = [rng.Permutation(1000, 4, "epoch").at(places), rng.Permutation(1000, 3, "x").at(places)]
    for other in (*others, order.at(places, 1)):
        assert (other == order.at(places)).sum() < 10
    late = torch.tensor([999, 1000, 10**9 + 7])
    assert torch.equal(order.walk(late), order.at(torch.tensor([999, 0, 7]), torch.tensor([0, 1, 10**6])))
    assert order.at(torch.tensor([], dtype=torch.int64)).numel() == 0


def test_what_is_outside_a_permutation() -> None:
    for size in (0, -1, 2**40 + 1):
        with pytest.raises(ValueError, match=rf"size must be in \[1, 2\*\*40\], got {size}"):
            rng.Permutation(size, 0)
    for place in (-1, 3):
        with pytest.raises(IndexError, match=f"place {place} is not in"):
            rng.Permutation(3, 0)[place]


def test_a_walk_has_no_operator_per_place() -> None:
    """Counted, as a clock would tell of the machine: one operator for at least 5 of a million places."""
    order = rng.Permutation(10**7, 0, "x")
    with _Counted() as counted:
        order.walk(torch.arange(9_000_000, 10_000_000))
    assert 0 < counted.num < 200_000


class _Counted(TorchDispatchMode):
    """Counts the operators that run under it."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += 1
        return func(*args, **(kwargs or {}))


def test_orders_of_stored_runs_stay_what_they_are() -> None:
    assert list(rng.Permutation(10, 0, "epoch")) == [8, 1, 2, 3, 4, 9, 7, 0, 6, 5]
    assert rng.Permutation(10**7, 3, "epoch").walk(torch.tensor([0, 10**7, 10**12])).tolist() == [
        823629,
        8800509,
        8526014,
    ]


def test_uniform_numbers_are_the_hash_they_claim_to_be() -> None:
    """By Python's integers, modulo 2**64: what was drawn once is drawn again."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    keys = [0, 1, 2**62 + 5, rng.key(3, "a")]
    counters = [0, 7, 2**40, 123_456_789]
    want = []
    for key, counter in zip(keys, counters, strict=True):
        inner = mix((counter * 0x1E3779B97F4A7C15 + key) % 2**64)
        want.append((mix((inner + 0x369DEA0F31A53F85) % 2**64) >> 11) / 2**53)
    assert rng.uniform(torch.tensor(keys), torch.tensor(counters)).tolist() == want
