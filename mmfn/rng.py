"""Randomness as a function of a key: (seed, step, path) -> generator. Nothing here touches torch's global state."""

import hashlib

import torch


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
