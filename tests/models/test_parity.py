"""Random models of every family against transformers, the weights moved through real checkpoints.

Logits, loss and the gradient of every parameter: in float64, where only the order of sums may differ, and in float32 as
both run. A family joins by its line in `FAMILIES` and its recipe in `tests/oracles`.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import mmfn
from mmfn import ops as op_tables
from mmfn.train.evidence.float64 import float64
from tests import oracles
from tests.batches import wide

NUM, NUM_NARROW, FAST = 28, 28, 4  # seeds in float64, in float32 beside these, and every how many in the fast suite
LIMITS = (
    {"images": 4, "videos": 0},
    {"images": 2, "videos": 2},
    {"images": 0, "videos": 0, "audios": 0},
    {"images": 1, "videos": 1},
)
EXACT = 1e-11  # of the largest value; sums in another order leave about 1e-14, of the delta rule 1e-12
LEAST = 1e-4  # a gradient smaller than this part of the largest of a model is compared with that part


def cases(first, count):
    """(family, seed) of all families there are."""
    return [
        pytest.param(family, seed, marks=() if seed % FAST == 0 else pytest.mark.slow)
        for family in oracles.TYPES
        for seed in range(first, first + count)
    ]


class Case:
    """A random model of both sides, and what each says of a random batch.

    Seeds mix rows, sides of padding, media, shards of checkpoints, padded calls and rows alone, and tables of ops.
    """

    def __init__(self, family, seed, folder, dtype):
        self.oracle = oracles.build(oracles.random_config(seed, family), seed, dtype)
        self.seed, self.is_wide, cfg = seed, dtype == torch.float64, self.oracle.config
        has_routers = any(name.endswith("mlp.gate.weight") for name, _ in self.oracle.named_parameters())
        if has_routers and seed % 3:
            cfg.text_config.output_router_logits = True  # their balance is a part of the loss
        pad, limits = ("right", "left")[seed // 3 % 2], LIMITS[seed // 2 % 4]
        self.inputs = oracles.labelled(cfg, seed, rows=1 + seed % 3, pad=pad, **limits)
        size = "20KB" if seed % 5 == 0 else "5GB"
        self.model = mmfn.load_hf(oracles.save(self.oracle, folder, max_shard_size=size))
        batch = mmfn.batch_from_hf(self.inputs, self.model)
        self.batch = wide(batch) if self.is_wide else batch
        self.table = op_tables.reference() if seed % 7 == 0 else op_tables.portable()

    def gradients(self, fn):
        """`(value, {name: gradient})` here, by the names the library has in memory."""
        with float64() if self.is_wide else nullcontext():
            value, grads = mmfn.value_and_grad(fn)(self.model.params)
        named = mmfn.to_hf(grads, self.model, "transformers")
        return value, {name.removeprefix("thinker."): grad for name, grad in named.items()}

    def logits(self, params):
        return mmfn.logits(replace(self.model, params=params), self.batch, self.table)

    def loss(self, params):
        return mmfn.loss(params, self.batch, self.model, ops=self.table)[0]

    def oracle_logits(self):
        """Of a padded call or of its rows alone."""
        rows = oracles.rows_of(self.inputs) if self.seed // 2 % 2 else [self.inputs]
        return torch.cat([oracles.real_logits(self.oracle, row) for row in rows])

    def oracle_gradients(self, value):
        self.oracle.zero_grad()
        with float64() if self.is_wide else nullcontext():
            value.backward()
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.oracle.named_parameters()}


def compared(case):
    """`(here, there)` by name: logits, then the gradient of a sum in which each counts; the loss, and its gradient."""
    want_TV = case.oracle_logits()
    weights_TV = torch.randn(want_TV.shape, generator=torch.Generator().manual_seed(7), dtype=want_TV.dtype)
    weights_TV /= len(want_TV)
    got_TV = []

    def projected(params):
        got_TV.append(case.logits(params))
        return (got_TV[0] * weights_TV).sum()

    _, grads = case.gradients(projected)
    yield {"logits": got_TV[0].detach()}, {"logits": want_TV.detach()}
    yield without_buffers(case, grads), case.oracle_gradients((want_TV * weights_TV).sum())
    loss = oracles.run(case.oracle, case.inputs).loss
    got, grads = case.gradients(case.loss)
    assert loss.isfinite()
    yield {"loss": got}, {"loss": loss.detach().to(got.dtype)}
    yield without_buffers(case, grads), case.oracle_gradients(loss)


def without_buffers(case, gradients):
    """A leaf that is a buffer of the library's is trained by no gradient here."""
    buffers = dict(case.oracle.named_buffers())
    for name in buffers.keys() & gradients.keys():
        assert not gradients[name].any(), name
    return {name: gradient for name, gradient in gradients.items() if name not in buffers}


def assert_exact(got, want):
    least = LEAST * max(value.abs().max().item() for value in want.values())
    for name, value in want.items():
        assert got[name].dtype == value.dtype == torch.float64
        scale = max(value.abs().max().item(), least)
        torch.testing.assert_close(got[name], value, rtol=0, atol=EXACT * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("family", "seed"), cases(0, NUM))
def test_everything_equals_transformers_in_float64(family, seed, tmp_path):
    for got, want in compared(Case(family, seed, tmp_path, torch.float64)):
        assert got.keys() == want.keys()
        assert_exact(got, want)


@pytest.mark.parametrize(("family", "seed"), cases(100, NUM_NARROW))
def test_everything_equals_transformers_in_float32(family, seed, tmp_path):
    atol = oracles.narrow_atol(family)
    for got, want in compared(Case(family, seed, tmp_path, torch.float32)):
        assert got.keys() == want.keys()
        for name, value in want.items():
            limit = {"rtol": oracles.RTOL, "atol": atol * max(1.0, value.abs().max().item())}
            torch.testing.assert_close(got[name], value, **limit, msg=lambda m, n=name: f"{n}: {m}")
