"""Randomness as a function of a key: (seed, step, path) -> generator. Nothing here touches torch's global state."""

import hashlib

import torch
from torch import Tensor

LARGEST = 2**40  # of a Permutation
_ROUNDS = 24  # fewer show in sets of less than ten
_CHUNK = 2**15  # places that are worked out together: what they need stays in the processor's cache
# Odd numbers without a pattern, that tell turns, rounds and the halves of a value apart.
_TURN, _PAIR, _ROUND, _HALF = 0x1E3779B97F4A7C15, 0x369DEA0F31A53F85, 0x2545F4914F6CDD1D, 0x5851F42D4C957F2D


def key(seed: int, *parts: int | str) -> int:
    """A 63-bit key from a seed and any sequence of ints and strings, e.g. `key(seed, step, "text/embed")`.

    Different sequences give independent keys: the parts are hashed with their types and lengths (BLAKE2b).
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *parts):
        data = f"{type(part).__name__}:{part}".encode()
        digest.update(len(data).to_bytes(4, "little") + data)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(seed: int, *parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh `torch.Generator` seeded with `key(seed, *parts)`: the same arguments draw the same numbers."""
    return torch.Generator(device=device).manual_seed(key(seed, *parts))


def permutation(size: int, seed: int, *parts: int | str) -> list[int]:
    """A permutation of `range(size)`, a function of its arguments alone."""
    order: list[int] = torch.randperm(size, generator=generator(seed, *parts)).tolist()
    return order


def uniform(keys_N: Tensor, counters_N: Tensor) -> Tensor:
    """float64[N] in [0, 1): one number for each pair of a key (of `key`) and a counter, int64[N] both.

    Numbers of different pairs are independent, and each is worked out where the tensors are.
    """
    bits_N = _mix(_mix(counters_N * _TURN + keys_N) + _PAIR)
    return (bits_N >> 11 & 2**53 - 1).to(torch.float64) * 2.0**-53


class Permutation:
    """A permutation of `range(size)`, in every turn another, whose values are worked out one by one: there is no table.

    It is a function of `(size, seed, parts)`. The places of ten million rows take no memory, and the last one is found
    as fast as the first:

    >>> order = Permutation(10, 0, "epoch")
    >>> [order[place] for place in range(10)]  # of turn 0
    [8, 1, 2, 3, 4, 9, 7, 0, 6, 5]
    >>> order.at(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 7]))  # the third is of turn 7
    tensor([8, 1, 5])

    Source: cycle walking over a keyed Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002, methods 2 and 3); its round function is the finalizer of splitmix64 (Steele, Lea and Flood, 2014).
    """

    def __init__(self, size: int, seed: int, *parts: int | str) -> None:
        """Raises ValueError for a size outside [1, 2**40]."""
        if not 1 <= size <= LARGEST:
            raise ValueError(f"size must be in [1, 2**40], got {size}")
        self.size = size
        self._key = key(seed, "permutation", *parts)
        bits = max(1, (size - 1).bit_length())
        self._low_bits = bits // 2
        self._masks = (1 << self._low_bits) - 1, (1 << (bits - self._low_bits)) - 1

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> int:
        """The value at a place of turn 0. Raises IndexError behind the end."""
        if not 0 <= place < self.size:
            raise IndexError(f"place {place} is not in [0, {self.size})")
        return int(self.at(torch.tensor([place])))

    def at(self, places_N: Tensor, turns_N: Tensor | int = 0) -> Tensor:
        """Values at places (int64[N], each in [0, size)) of turns (any integers, one for all or each) -> int64[N]."""
        places_N = places_N.to(torch.int64)
        keys_N = _mix(torch.as_tensor(turns_N, dtype=torch.int64) * _TURN + self._key).expand(places_N.shape)
        chunks = zip(torch.split(places_N, _CHUNK), torch.split(keys_N, _CHUNK), strict=True)
        return torch.cat([self._walk(*chunk) for chunk in chunks])

    def walk(self, places_N: Tensor) -> Tensor:
        """All turns behind each other: values at places (int64[N], from 0) of the endless sequence -> int64[N]."""
        return self.at(places_N % self.size, places_N // self.size)

    def _walk(self, values_N: Tensor, keys_N: Tensor) -> Tensor:
        """The network permutes the next power of two; what it throws out of range goes through it again."""
        values_N = self._shuffle(values_N, keys_N)
        while (outside := (values_N >= self.size).nonzero().squeeze(1)).numel():
            values_N[outside] = self._shuffle(values_N[outside], keys_N[outside])
        return values_N

    def _shuffle(self, values_N: Tensor, keys_N: Tensor) -> Tensor:
        low, high = self._masks
        low_N, high_N = values_N & low, values_N >> self._low_bits
        for _ in range(_ROUNDS // 2):
            low_N = low_N ^ (_mix(high_N * _HALF + keys_N) & low)
            high_N = high_N ^ (_mix(low_N * _HALF + keys_N + _ROUND) & high)
            keys_N = keys_N + _PAIR
        return high_N << self._low_bits | low_N


def _mix(x_N: Tensor) -> Tensor:
    """A bijection of int64 whose every output bit depends on every input bit."""
    x_N = (x_N ^ (x_N >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    x_N = (x_N ^ (x_N >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
    return x_N ^ (x_N >> 31 & 2**33 - 1)
