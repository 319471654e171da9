"""The tables: the same entries with the same signatures."""

import inspect
from itertools import product

import pytest
import torch

from mmfn import ops
from tests.npu.table import emulated


def signature(fn):
    """Parameter names and kinds of what every table must accept (an entry may add keywords with defaults)."""
    parameters = inspect.signature(fn).parameters.values()
    return [(p.name, p.kind) for p in parameters if p.kind != p.KEYWORD_ONLY or p.default is p.empty]


def test_tables_agree_in_signatures():
    reference = ops.reference()
    for table, name in product((ops.portable(), ops.table("cuda"), emulated()), ops.kernels(reference)):
        assert signature(getattr(reference, name).fn) == signature(getattr(table, name).fn), name


def test_tables_by_name():
    assert ops.table("reference").attention.fn is ops.reference().attention.fn
    assert ops.table("portable").notes == ops.portable().notes
    with pytest.raises(
        ValueError, match="'fast' is no table of ops; use one of 'portable', 'reference', 'cuda', 'npu'"
    ):
        ops.table("fast")
    with pytest.raises(ValueError, match="cross_entropy is 'chunks' but must be one of auto, logits, attention"):
        ops.portable(cross_entropy="chunks")


def test_place_features_leaves_zeros_where_there_is_no_feature():
    features_ND = torch.arange(6.0).reshape(3, 2).requires_grad_()
    placed_TD = ops.place_features(features_ND, torch.tensor([-1, 1, -1, 0]))
    assert placed_TD.tolist() == [[0, 0], [2, 3], [0, 0], [0, 1]]
    assert torch.autograd.grad(placed_TD.sum(), features_ND)[0].tolist() == [[1, 1], [1, 1], [0, 0]]
    none = ops.place_features(features_ND[:0], torch.full((4,), -1))
    assert none.shape == (4, 2)
    assert not none.any()
