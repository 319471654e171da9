"""Masks against Python's own integers and against chance; what an adapter does with one against written formulas."""

from itertools import product
from math import floor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mmfn import dropout
from mmfn import ops as op_tables
from mmfn.lora import Adapter, Drops
from mmfn.models.layers import linear

OPS = op_tables.portable()

SALT = 0x1234_5678_9ABC_DEF0
SIGMAS = 5.0  # a sum of independent terms is that far off once in two million times


def mixed(x: int) -> int:
    """The mixer, in integers of any size."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 15)


def kept(row: int, column: int, salt: int, rate: float) -> bool:
    """The hash of (salt, row, column) is not among the `rate` smallest."""
    state = mixed(row % 2**32 ^ salt % 2**32)
    state = mixed(mixed(state ^ (row >> 32) % 2**32) ^ salt >> 32)
    return mixed(state ^ mixed(column)) >= floor(rate * 2**32)


def made(ids: Any, salt: int, num_columns: int, rate: float) -> Tensor:
    return dropout.keep_mask(torch.as_tensor(ids, dtype=torch.int64), torch.tensor(salt), num_columns, rate)


def scores(ids: Any, salt: int, num_columns: int, rate: float) -> Tensor:
    """The mask as numbers of mean 0 and variance 1, if it is what it claims to be."""
    return (made(ids, salt, num_columns, rate).double() - (1 - rate)) / (rate * (1 - rate)) ** 0.5


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.999])
def test_a_mask_is_the_hash_it_claims_to_be(rate: float) -> None:
    """Ids of first and later samples, the largest there are, and padding; salts of any size."""
    ids = [0, 1, 77, 3 << 32, 3 << 32 | 5, (2**31 - 1) << 32 | (2**32 - 1), -1]
    for salt in (0, 1, SALT, 2**63 - 1):
        want = [[kept(row, column, salt, rate) for column in range(37)] for row in ids]
        assert made(ids, salt, 37, rate).tolist() == want
    assert made([], 1, 5, rate).shape == (0, 5)


def test_no_product_is_too_large_and_the_mixer_is_a_bijection() -> None:
    top = torch.tensor([2**32 - 1, 2**31, 0])
    assert dropout.mix(top).tolist() == [mixed(x) for x in top.tolist()]
    assert (2**32 - 1) * max(0x21F0AAAD, 0x735A2D97) < 2**63
    assert dropout.mix(torch.arange(2**20)).unique().numel() == 2**20


def test_salts_are_functions_of_key_and_step() -> None:
    keys, steps = [0, 5, SALT, 2**63 - 1], [0, 1, 2, 10**6]
    found = []
    for step in steps:
        got = dropout.salts(torch.tensor(keys), torch.tensor(step)).tolist()
        for key, salt in zip(keys, got, strict=True):
            low = mixed(key % 2**32 ^ mixed(step))
            assert salt == mixed(key >> 32 ^ low) // 2 * 2**32 + low
        found += got
    assert len(set(found)) == len(keys) * len(steps)
    assert all(0 <= salt < 2**63 for salt in found)


def test_a_large_mask_made_in_parts_is_the_same() -> None:
    for num_rows, num_columns in ((1030, 4096), (3, dropout.PART_CPU + 1)):
        ids_T = torch.arange(num_rows) | 9 << 32
        whole_TC = made(ids_T, SALT, num_columns, 0.3)
        assert whole_TC.numel() > 2 * dropout.PART_CPU
        assert torch.equal(whole_TC, torch.cat([made(row_T, SALT, num_columns, 0.3) for row_T in ids_T[:, None]]))


def token_ids(num_samples: int, num_tokens: int) -> Tensor:
    """Of samples with consecutive numbers, as they are packed."""
    return (torch.arange(num_samples)[:, None] << 32 | torch.arange(num_tokens)).flatten()


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_rates_of_rows_and_columns(rate: float) -> None:
    """The whole, and chi-square over rows and over columns: sums that vary as sums of independent draws do."""
    z_TC = scores(token_ids(64, 512), SALT, 256, rate)
    T, C = z_TC.shape
    assert abs(z_TC.sum()) < SIGMAS * (T * C) ** 0.5
    assert abs((z_TC.sum(1).square() / C).sum() - T) < SIGMAS * (2 * T) ** 0.5 * 1.1  # the tenth: drops are skew
    assert abs((z_TC.sum(0).square() / T).sum() - C) < SIGMAS * (2 * C) ** 0.5 * 1.1


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_neighbours_are_independent(rate: float) -> None:
    """Chi-square of the 16 patterns of 2 x 2 blocks, over neighbouring rows and columns and over further ones."""
    keep_TC = made(token_ids(32, 1024), SALT + 1, 256, rate)
    share = np.array([rate, 1 - rate])
    for row, column in product((1, 2, 512, 1024), (1, 2, 64, 128)):
        bits = keep_TC.view(-1, 2, row, 256 // (2 * column), 2, column).permute(1, 4, 0, 2, 3, 5).flatten(0, 1)
        pattern = sum(bit.long() << i for i, bit in enumerate(bits)).flatten()
        counts = torch.bincount(pattern, minlength=16).numpy()
        expected = pattern.numel() * np.array([np.prod(share[[p >> i & 1 for i in range(4)]]) for p in range(16)])
        assert ((counts - expected) ** 2 / expected).sum() < 60, (row, column)  # 15 degrees of freedom: 1 in 10**6


def test_pairs_of_columns_of_rows_and_of_masks_are_uncorrelated() -> None:
    """No pair stands out, and the squares of all correlations vary as those of independent draws do."""
    z_TC = scores(token_ids(16, 512), SALT, 256, 0.5)
    others = {
        "another adapter or step": scores(token_ids(16, 512), SALT + 1, 256, 0.5),
        "upper half of the salt": scores(token_ids(16, 512), SALT ^ 1 << 40, 256, 0.5),
        "the next step's samples": scores(token_ids(32, 512)[-16 * 512 :], SALT, 256, 0.5),
    }
    T, C = z_TC.shape
    upper = torch.ones(C, C).triu(1).bool()
    tables = {"columns": (z_TC.T @ z_TC / T**0.5)[upper]}
    tables["rows"] = (z_TC[:C] @ z_TC[:C].T / C**0.5)[upper]
    tables |= {name: (z_TC.T @ other_TC / T**0.5).flatten() for name, other_TC in others.items()}
    for name, pairs in tables.items():
        assert pairs.abs().max() < 6.6, name  # of up to 65,536 pairs: 1 in 10**5
        assert abs(pairs.square().mean() - 1) < SIGMAS * (2 / pairs.numel()) ** 0.5 * 1.1, name
    for name, other_TC in others.items():
        assert abs((z_TC * other_TC).sum()) < SIGMAS * (T * C) ** 0.5, name


def adapted(rate: float, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Parameters of a layer [5, 11] with an adapter that drops, its x of 7 rows, and a seed of gradients."""
    g = torch.Generator().manual_seed(0)
    w, bias, a, b, x_TC, seed = (
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((5, 11), (5,), (2, 11), (5, 2), (7, 11), (7, 5))
    )
    drops = Drops(ids_T=torch.tensor([3, 4, 5, 1 << 32, 1 << 32 | 1, 9 << 32, -1]), salt=torch.tensor(SALT))
    adapter = Adapter(a=a, b=b, alpha=3.0, is_rs=False, dropout=rate, drops=drops)
    return {"weight": w, "bias": bias, "lora": {"weight": adapter}}, x_TC, seed.detach()


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_a_layer_with_dropout_and_its_gradients(rate: float) -> None:
    params, x_TC, seed = adapted(rate)
    adapter = params["lora"]["weight"]
    y = linear.apply(params, x_TC, OPS)
    inputs = (x_TC, params["weight"], params["bias"], adapter.a, adapter.b)
    grads = torch.autograd.grad(y, inputs, seed)

    x, w, bias, a, b, dy = (tensor.detach().numpy() for tensor in (*inputs, seed))
    ids = adapter.drops.ids_T.tolist()
    factor = np.array([[kept(row, column, SALT, rate) for column in range(11)] for row in ids]) / (1 - rate)
    assert 0 < (factor == 0).sum() < factor.size
    dropped = x * factor
    low, d_low = 1.5 * dropped @ a.T, 1.5 * dy @ b
    want = (dy @ w + d_low @ a * factor, dy.T @ x, dy.sum(0), d_low.T @ dropped, dy.T @ low)
    np.testing.assert_allclose(y.detach(), x @ w.T + bias + low @ b.T, rtol=1e-12, atol=1e-13)
    for got, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)

    compiled = torch.compile(linear.apply, backend="aot_eager", fullgraph=True)
    graphed = compiled(params, x_TC, OPS)
    for got, expected in zip((graphed, *torch.autograd.grad(graphed, inputs, seed)), (y, *grads), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


def test_only_what_is_trained_gets_a_gradient() -> None:
    params, x_TC, seed = adapted(0.4)
    adapter = params["lora"]["weight"]
    frozen = {**params, "weight": params["weight"].detach(), "bias": params["bias"].detach()}
    want = torch.autograd.grad(linear.apply(params, x_TC, OPS), (adapter.a, adapter.b), seed)
    got = torch.autograd.grad(linear.apply(frozen, x_TC.detach(), OPS), (adapter.a, adapter.b), seed)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))
    assert linear.apply(frozen, x_TC.detach().bfloat16(), OPS).dtype == torch.bfloat16


def test_a_mask_is_all_that_is_kept_besides_x() -> None:
    """Two layers that drop from one x keep it once, whole, and a byte per element each."""
    params, x_TC, _ = adapted(0.4)
    frozen = {**params, "weight": params["weight"].detach(), "bias": params["bias"].detach()}
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        linear.apply(frozen, x_TC, OPS)
        linear.apply(frozen, x_TC, OPS)
    wide = [x for x in saved if x.shape == x_TC.shape]
    assert {x.dtype for x in wide} == {torch.bool, torch.float64}
    assert sum(x.dtype == torch.bool for x in wide) == 2
    assert len({x.untyped_storage().data_ptr() for x in wide if x.dtype != torch.bool}) == 1


def test_without_drops_nothing_changes() -> None:
    """An adapter outside of training computes, bitwise, as one that never drops."""
    params, x_TC, _ = adapted(0.4)
    own = params["lora"]["weight"]
    plain = [Adapter(a=own.a, b=own.b, alpha=3.0, is_rs=False, dropout=rate) for rate in (0.0, 0.4)]
    values = [linear.apply({**params, "lora": {"weight": adapter}}, x_TC, OPS) for adapter in plain]
    assert torch.equal(*values)
    assert not torch.equal(values[0], linear.apply(params, x_TC, OPS))
