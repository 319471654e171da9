"""A layer of experts on its own, against transformers' block and against its properties."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

from mmfn import ops as op_tables
from mmfn import tree
from mmfn.models.layers import moe
from mmfn.models.layers.balance import balance
from mmfn.models.layers.moe import MoeConfig
from mmfn.parallel.transforms.expert_parallel import kept_rows
from mmfn.spec import init_params
from tests import oracles

CFG = MoeConfig(d_model=12, d_ff=7, num_experts=5, num_chosen=2, init_std=1.0)
TABLES = {"reference": op_tables.reference(), "portable": op_tables.portable()}


def draw(cfg=CFG, num_tokens=11, seed=0):
    """Parameters and x_TD as leaves, and the gradient of y, in float64."""
    g = torch.Generator().manual_seed(seed)
    params = tree.map(lambda p: (p.double() / p.shape[-1] ** 0.5).requires_grad_(), init_params(moe.specs(cfg), seed))
    x_TD, dy_TD = (torch.randn(num_tokens, cfg.d_model, generator=g, dtype=torch.float64) for _ in range(2))
    return params, x_TD.requires_grad_(), dy_TD


def all_real(x_TD):
    return torch.ones(x_TD.shape[0], dtype=torch.bool)


def run(params, x_TD, is_real_T, cfg=CFG, ops=TABLES["portable"]):
    return moe.apply(params, x_TD, is_real_T, cfg=cfg, ops=ops)


def gradients(y_TD, dy_TD, params, x_TD):
    return torch.autograd.grad(y_TD, [*tree.leaves(params), x_TD], dy_TD, materialize_grads=True)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(5, 2), (4, 4), (7, 1), (1, 1)])
def test_equals_transformers(num_experts, num_chosen, name):
    cfg = replace(CFG, num_experts=num_experts, num_chosen=num_chosen)
    params, x_TD, dy_TD = draw(cfg)
    hf = oracles.config(
        family="qwen3_vl_moe",
        text={
            "hidden_size": cfg.d_model,
            "moe_intermediate_size": cfg.d_ff,
            "num_experts": num_experts,
            "num_experts_per_tok": num_chosen,
        },
    )
    block = Qwen3VLMoeTextSparseMoeBlock(hf.text_config).double()
    named = {"gate.weight": params["router"]["weight"]}
    named |= {f"experts.{name}_proj": params["experts"][name] for name in ("gate_up", "down")}
    want_TD = torch.func.functional_call(block, named, (x_TD[None],))[0]
    y_TD, _ = run(params, x_TD, all_real(x_TD), cfg, TABLES[name])
    # its router computes in float32 whatever the dtype
    torch.testing.assert_close(y_TD, want_TD, rtol=1e-6, atol=1e-7)
    for got, want in zip(gradients(y_TD, dy_TD, params, x_TD), gradients(want_TD, dy_TD, params, x_TD), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_token_alone_equals_the_token_among_others():
    params, x_TD, _ = draw()
    y_TD, _ = run(params, x_TD, all_real(x_TD))
    alone = [run(params, x_1D, torch.ones(1, dtype=torch.bool))[0] for x_1D in x_TD.split(1)]
    torch.testing.assert_close(y_TD, torch.cat(alone), rtol=1e-13, atol=1e-13)


def test_renaming_experts_changes_nothing():
    params, x_TD, dy_TD = draw()
    order_E = torch.tensor([3, 0, 4, 1, 2])
    renamed = tree.map(lambda p: p.detach()[order_E].requires_grad_(), params)
    (y_TD, stats), (other_TD, other) = (run(p, x_TD, all_real(x_TD)) for p in (params, renamed))
    torch.testing.assert_close(other_TD, y_TD, rtol=1e-13, atol=1e-13)
    assert torch.equal(other["counts_E"], stats["counts_E"][order_E])
    torch.testing.assert_close(other["probs_E"], stats["probs_E"][order_E])
    *grads, dx_TD = gradients(y_TD, dy_TD, params, x_TD)
    *other_grads, other_dx_TD = gradients(other_TD, dy_TD, renamed, x_TD)
    torch.testing.assert_close(other_dx_TD, dx_TD, rtol=1e-12, atol=1e-12)
    for got, want in zip(other_grads, grads, strict=True):
        torch.testing.assert_close(got, want[order_E], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TABLES)
def test_padding_gives_zeros_counts_nowhere_and_reaches_no_expert(name):
    params, x_TD, dy_TD = draw(num_tokens=11)
    is_real_T = torch.tensor([True] * 4 + [False] * 2 + [True] * 2 + [False] * 3)
    seen = []
    base = TABLES[name]

    def experts(x_RD, counts_E, weights):
        seen.append(counts_E)
        return base.experts(x_RD, counts_E, weights)

    y_TD, stats = run(params, x_TD, is_real_T, ops=replace(base, experts=experts))
    short_TD = x_TD[is_real_T]
    want_TD, want_stats = run(params, short_TD, all_real(short_TD), ops=replace(base, experts=experts))
    assert not y_TD[~is_real_T].any()
    torch.testing.assert_close(y_TD[is_real_T], want_TD, rtol=1e-13, atol=1e-13)
    for key, want in want_stats.items():
        torch.testing.assert_close(stats[key], want, rtol=1e-13, atol=1e-13)
    assert torch.equal(*seen)
    for got, want in zip(
        gradients(y_TD, dy_TD, params, x_TD), gradients(want_TD, dy_TD[is_real_T], params, x_TD), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_statistics_are_sums_over_tokens():
    params, x_TD, _ = draw()
    _, stats = run(params, x_TD, all_real(x_TD))
    logits_TE = x_TD @ params["router"]["weight"].T
    _, experts_TX = logits_TE.softmax(-1).topk(2)
    assert stats["counts_E"].tolist() == [float((experts_TX == e).sum()) for e in range(5)]
    torch.testing.assert_close(stats["probs_E"], logits_TE.softmax(-1).sum(0), rtol=1e-12, atol=0)
    assert (stats["rows"].item(), stats["dropped"].item()) == (11.0, 0.0)
    assert not stats["counts_E"].requires_grad
    assert stats["probs_E"].requires_grad
    _, narrow = run(tree.map(lambda p: p.bfloat16(), params), x_TD.bfloat16(), all_real(x_TD))
    assert {value.dtype for value in narrow.values()} == {torch.float32}


def test_totals_add_up_and_layers_without_a_router_add_nothing():
    params, x_TD, _ = draw()
    _, one = run(params, x_TD, all_real(x_TD))
    both = moe.total([one, None, one])
    for key, value in one.items():
        torch.testing.assert_close(both[key], 2 * value)
    assert moe.total([None, None]) is None
    assert moe.total([]) is None


def test_rows_that_are_left_out_are_reported():
    """A capacity of 3 rows per expert: the others give zeros and `dropped` counts them."""
    base = op_tables.portable()

    def kept(counts_E, num_rows):
        return counts_E.clamp(max=3)

    def experts(x_RD, counts_E, weights):
        parts = zip(base.experts(x_RD, counts_E, weights).split(counts_E.tolist()), counts_E.tolist(), strict=True)
        return torch.cat([part * (torch.arange(n) < 3)[:, None] for part, n in parts])

    params, x_TD, _ = draw()
    y_TD, stats = run(params, x_TD, all_real(x_TD), ops=replace(base, kept=kept, experts=experts))
    assert stats["dropped"].item() == (stats["counts_E"] - 3).clamp(min=0).sum().item() > 0
    whole_TD, _ = run(params, x_TD, all_real(x_TD))
    assert 0 < int((y_TD != whole_TD).any(1).sum()) <= stats["dropped"].item()


@pytest.mark.parametrize("capacity", [0.5, 1.0])
@pytest.mark.parametrize("pattern", ["behind", "before", "between"])
def test_padding_takes_no_capacity(pattern, capacity):
    """All tokens want one expert of a rank with room for 4 of 8 rows, or for 2: what is dropped is exact."""
    cfg = replace(CFG, d_model=4, d_ff=4, num_experts=4, num_chosen=1)
    is_real_T = torch.tensor([True] * 4 + [False] * 4)
    is_real_T = {"behind": is_real_T, "before": ~is_real_T, "between": is_real_T[[0, 4, 5, 1, 6, 2, 3, 7]]}[pattern]
    params = tree.map(torch.Tensor.detach, draw(cfg)[0])
    params["router"]["weight"] = torch.zeros(4, 4, dtype=torch.float64)
    params["router"]["weight"][0] = 1
    base, kept = TABLES["portable"], partial(kept_rows, num_ranks=2, factor=capacity)

    def experts(x_RD, counts_E, weights):
        """One rank of ep 2: rows that are not kept give zeros."""
        y_RD, place_R = base.experts(x_RD, counts_E, weights), torch.arange(len(x_RD))
        return torch.where((place_R < kept(counts_E, len(x_RD))[0])[:, None], y_RD, 0)

    x_TD = torch.ones(8, 4, dtype=torch.float64) + torch.arange(8)[:, None] * 0.1
    y_TD, stats = run(params, x_TD, is_real_T, cfg, replace(base, experts=experts, kept=kept))
    room = int(capacity * 4)
    assert int(((y_TD == 0).all(1) & is_real_T).sum()) == stats["dropped"].item() == 4 - room
    assert stats["counts_E"].tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize("name", TABLES)
def test_ties_go_to_the_lower_experts(name):
    """A router that prefers nothing, and repeated rows: every token goes to the first ones."""
    params, x_TD, _ = draw()
    params["router"]["weight"] = torch.zeros(5, 12, dtype=torch.float64)
    _, stats = run(params, x_TD, all_real(x_TD), ops=TABLES[name])
    assert stats["counts_E"].tolist() == [11, 11, 0, 0, 0]


def test_a_layer_makes_few_tensors_of_routed_rows():
    """Beside what experts make themselves: rows in and out, and the gradient of each."""
    cfg = replace(CFG, d_model=64, d_ff=1, num_experts=8, num_chosen=8)
    params, x_TD, dy_TD = draw(cfg, num_tokens=100)
    R_bytes, seen = 100 * 8 * 64 * 8, Counter()

    class Large(TorchDispatchMode):
        is_eager = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= R_bytes:
                    seen[x.untyped_storage()._cdata] += 1
                    alive.append(x)
            return out

    alive = []
    with Large():
        y_TD, _ = run(params, x_TD, all_real(x_TD), cfg)
        forward = len(seen)
        gradients(y_TD, dy_TD, params, x_TD)
    assert (forward, len(seen) - forward) == (2, 2)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_padding_alone_balances_to_zero(num_tokens):
    """No rows to divide by: neither the loss nor a gradient is undefined."""
    params, x_TD, _ = draw(num_tokens=num_tokens)
    y_TD, stats = run(params, x_TD, torch.zeros(num_tokens, dtype=torch.bool))
    loss = balance(moe.total([stats]), TABLES["portable"])
    assert loss.item() == 0
    assert not y_TD.any()
    assert not any(grad.any() for grad in gradients(loss, None, params, x_TD))


def test_no_token():
    params, x_TD, dy_TD = draw(num_tokens=0)
    y_TD, stats = run(params, x_TD, all_real(x_TD))
    assert y_TD.shape == (0, 12)
    assert not any(value.any() for value in stats.values())
    assert not any(grad.any() for grad in gradients(y_TD, dy_TD, params, x_TD))


def test_more_chosen_experts_than_there_are_is_refused():
    with pytest.raises(ValueError, match="num_experts_per_tok is 6 of 5 experts; correct one of them"):
        replace(CFG, num_chosen=6)
    with pytest.raises(ValueError, match="num_experts_per_tok is 4 of 3 experts in topk_group 1 of n_group 2; correct"):
        replace(CFG, num_experts=6, num_chosen=4, num_groups=2)
    with pytest.raises(ValueError, match="n_group is 2 but must divide 5, the number of experts"):
        replace(CFG, num_groups=2)


def test_a_bias_moves_the_choice_alone():
    """As large a bias as sends all tokens to two experts, in front of a layer of these two."""
    cfg = replace(CFG, scores="sigmoid", scale=1.5)
    params, x_TD, dy_TD = draw(cfg)
    params["router"]["choice_bias"] = torch.tensor([0, 9, 0, 0, 9], dtype=torch.float32)
    y_TD, stats = run(params, x_TD, all_real(x_TD), cfg)
    T = x_TD.shape[0]
    assert stats["counts_E"].tolist() == [0, T, 0, 0, T]
    two = {"router": {"weight": params["router"]["weight"][[1, 4]]}}
    two["experts"] = {name: x[[1, 4]] for name, x in params["experts"].items()}
    want_TD, _ = run(two, x_TD, all_real(x_TD), replace(cfg, num_experts=2), TABLES["reference"])
    torch.testing.assert_close(y_TD, want_TD, rtol=1e-12, atol=1e-12)
    (dweight_ED,) = torch.autograd.grad(y_TD, params["router"]["weight"], dy_TD)
    assert dweight_ED[[1, 4]].abs().min() > 0
    assert not dweight_ED[[0, 2, 3]].any()
