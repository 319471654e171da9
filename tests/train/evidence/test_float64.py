"""The float64 context against formulas written out here: nothing of the library stays in float32. Legend: T tokens."""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfn.train.evidence.float64 import WIDENED, float64
from tests import oracles


def delta_layer(layer, x_TD: Tensor) -> Tensor:
    """A Gated DeltaNet layer token by token. Source: Yang et al. 2024, "Gated Delta Networks", equation 10."""
    heads, key_heads, eps = layer.num_v_heads, layer.num_k_heads, layer.layer_norm_epsilon
    mixed_TC = x_TD @ layer.in_proj_qkv.weight.T
    kernel_CK = layer.conv1d.weight[:, 0]
    width = kernel_CK.shape[1]
    padded_TC = F.pad(mixed_TC, (0, 0, width - 1, 0))
    mixed_TC = sum(padded_TC[j : j + len(x_TD)] * kernel_CK[:, j] for j in range(width))
    mixed_TC = mixed_TC * mixed_TC.sigmoid()
    q, k, v = mixed_TC.split([layer.key_dim, layer.key_dim, layer.value_dim], 1)
    q, k = (y.unflatten(1, (key_heads, -1)).repeat_interleave(heads // key_heads, 1) for y in (q, k))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    q, v = q * layer.head_k_dim**-0.5, v.unflatten(1, (heads, -1))
    beta_TH = (x_TD @ layer.in_proj_b.weight.T).sigmoid()
    step_TH = (1 + (x_TD @ layer.in_proj_a.weight.T + layer.dt_bias).exp()).log()
    decay_TH = (-layer.A_log.exp() * step_TH).exp()
    state, outputs = x_TD.new_zeros(heads, layer.head_k_dim, layer.head_v_dim), []
    for t in range(len(x_TD)):
        state = state * decay_TH[t, :, None, None]
        error = (v[t] - torch.einsum("hkv,hk->hv", state, k[t])) * beta_TH[t, :, None]
        state = state + k[t, :, :, None] * error[:, None, :]
        outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
    out = torch.stack(outputs)
    out = layer.norm.weight * out * (out.square().mean(-1, keepdim=True) + eps).rsqrt()
    gate = (x_TD @ layer.in_proj_z.weight.T).unflatten(1, (heads, -1))
    return (out * gate * gate.sigmoid()).flatten(1) @ layer.out_proj.weight.T


@pytest.fixture(scope="module")
def hybrid():
    return oracles.build(oracles.config(family="qwen3_5"), 0, torch.float64)


def test_a_delta_layer_of_the_library_equals_the_recurrence(hybrid):
    layer = hybrid.model.language_model.layers[0].linear_attn
    x_TD = torch.randn(150, layer.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_TD.requires_grad_()
    leaves = [x_TD, *layer.parameters()]
    want_TD = delta_layer(layer, x_TD)
    want = torch.autograd.grad(want_TD.square().sum(), leaves)
    with float64():
        got_TD = layer(x_TD[None])[0]
        got = torch.autograd.grad(got_TD.square().sum(), leaves)
    torch.testing.assert_close(got_TD, want_TD, rtol=1e-12, atol=1e-12)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11 * other.abs().max().item())
    assert (layer(x_TD[None])[0] - want_TD).abs().max() > 1e-8  # what `.double()` alone leaves


def test_tables_made_inside_are_float64():
    for name in oracles.CLASSES:
        model = oracles.build(oracles.config(family=name), 0, torch.float64)
        buffers = dict(model.named_buffers())
        assert all(b.dtype == torch.float64 for b in buffers.values() if b.is_floating_point())
        text = buffers["model.language_model.rotary_emb.inv_freq"]
        rates = 10_000.0 ** -(torch.arange(len(text), dtype=torch.float64) / len(text))
        torch.testing.assert_close(text, rates, rtol=1e-15, atol=0)
    table = buffers_of_sound()
    inverse = torch.exp(-torch.arange(6, dtype=torch.float64) * torch.tensor(1e4, dtype=torch.float64).log() / 5)
    angles = torch.arange(13)[:, None] * inverse
    torch.testing.assert_close(table, torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1e-14)


def buffers_of_sound() -> Tensor:
    model = oracles.build(oracles.config(family="qwen3_omni_moe"), 0, torch.float64)
    return model.model.audio_tower.positional_embedding.positional_embedding


def test_everything_is_as_before_behind_the_context():
    before, narrow = torch.Tensor.float, torch.zeros(1, dtype=torch.float64)

    def fail():
        with float64():
            assert (narrow.float().dtype, torch.get_default_dtype()) == (torch.float64, torch.float64)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.Tensor.float is before
    assert (narrow.float().dtype, torch.get_default_dtype()) == (torch.float32, torch.float32)
    loaded = [m for name, m in sys.modules.items() if name.startswith(WIDENED)]
    named_torch = [vars(m)["torch"] for m in loaded if "torch" in vars(m)]
    assert len(named_torch) > 50
    assert all(module is torch for module in named_torch)
