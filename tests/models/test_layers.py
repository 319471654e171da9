"""Layers on their own: rotary tables, interpolated positions, cache and position ids."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding, Qwen3VLVisionRotaryEmbedding

from mmfn import ops as op_tables
from mmfn.batch import TEXT, VIDEO, Media, Sample
from mmfn.models.layers import cache, patches, rope, vision
from mmfn.models.layers.decoder import DecoderConfig
from mmfn.models.layers.positions import mrope
from mmfn.models.qwen3_vl import config_from_hf
from tests import oracles


@pytest.mark.parametrize("sections", [(4, 2, 2), (5, 3, 3), (0, 2, 3), (24, 20, 20)])
def test_text_tables_are_bitwise_those_of_transformers(sections):
    cfg = oracles.config(sections=sections)
    positions_3T = torch.randint(0, 200_000, (3, 40), generator=torch.Generator().manual_seed(0))
    cos, sin = Qwen3VLTextRotaryEmbedding(cfg.text_config)(torch.zeros(1), positions_3T[:, None])
    R = sum(sections)
    cos_TR, sin_TR = rope.interleaved(positions_3T, sections, 10_000.0)
    assert torch.equal(torch.cat([cos_TR, cos_TR], 1), cos[0])
    assert torch.equal(torch.cat([sin_TR, sin_TR], 1), sin[0])
    assert cos_TR.shape == (40, R)


def test_vision_tables_are_bitwise_those_of_transformers():
    cfg = oracles.config().vision_config
    coords_P4 = torch.randint(0, 90, (30, 4), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    cos, sin = Qwen3VLVisionRotaryEmbedding(cfg)(torch.zeros(1), coords_P4[:, :2])
    cos_PR, sin_PR = rope.axial(coords_P4, cfg.hidden_size // cfg.num_heads // 2, 10_000.0)
    assert torch.equal(torch.cat([cos_PR, cos_PR], 1), cos)
    assert torch.equal(torch.cat([sin_PR, sin_PR], 1), sin)


@pytest.mark.parametrize("num_positions", [1, 4, 25, 30])
@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 4, 10), (2, 12, 6)])
def test_positions_are_a_bilinear_resize_of_the_table(num_positions, grid):
    hf = oracles.config(vision={"num_position_embeddings": num_positions}).to_dict()
    cfg = config_from_hf(hf).vision
    t, h, w = grid
    weight = torch.randn(num_positions, cfg.d_model, generator=torch.Generator().manual_seed(0))
    media = Media(inputs_UF=torch.zeros(t * h * w, cfg.patch_values), grid=grid)
    kinds_T = torch.full((t * h * w // 4,), 2)
    sample = Sample(tokens_T=kinds_T, labels_T=kinds_T, kinds_T=kinds_T, videos=(media,))
    coords_P4 = patches.lay_frames(sample, 2, cfg.patch_values).coords_P4
    got_PD = vision.position_embed({"weight": weight}, coords_P4, op_tables.portable())
    side = int(num_positions**0.5)
    table = weight[: side * side].view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(table, (h, w), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
    blocks = resized.view(h // 2, 2, w // 2, 2, -1).transpose(1, 2).reshape(h * w, -1)
    torch.testing.assert_close(got_PD, blocks.repeat(t, 1), rtol=1e-5, atol=2e-6)


def test_a_patch_embedding_is_the_convolution():
    cfg = config_from_hf(oracles.config().to_dict()).vision
    weight = torch.randn(cfg.d_model, 3, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias = torch.arange(cfg.d_model, dtype=torch.float64)
    patches_PF = torch.randn(7, 3, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got_PD = vision.patch_embed(
        {"weight": weight.flatten(1), "bias": bias}, patches_PF.flatten(1), op_tables.portable()
    )
    torch.testing.assert_close(got_PD, F.conv3d(patches_PF, weight, bias).flatten(1), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"bytes still; bring it to the device by mmfn\.batch\.to"):
        vision.patch_embed({"weight": weight.flatten(1)}, patches_PF.flatten(1).byte(), op_tables.portable())


def test_the_cache_is_written_in_place_and_grows():
    (layer,) = cache.empty(1, (2, 4, 1, 3), torch.float32, torch.device("cpu"))
    slots = cache.Slots(
        rows_T=torch.tensor([0, 0, 1, 0]),
        columns_T=torch.tensor([0, 1, 0, 3]),
        lengths_B=torch.tensor([2, 1]),
        is_prefill=True,
    )
    k_TKC = torch.arange(1.0, 13).view(4, 1, 3)
    written = cache.write_(layer, slots, k_TKC, -k_TKC)
    assert written is layer
    assert torch.equal(written["k"][0, :2], k_TKC[:2])
    assert torch.equal(written["k"][1, 0], k_TKC[2])
    assert torch.equal(written["k"][0, 3], k_TKC[3])  # padding, in the spare column
    assert torch.equal(written["v"], -written["k"])
    assert not written["k"][1, 1:].any()
    memory = {"state": torch.arange(2.0)[:, None]}  # of a layer without columns
    grown, same = cache.with_columns([layer, memory], 6)
    assert grown["k"].shape == (2, 6, 1, 3)
    assert torch.equal(grown["v"][:, :4], layer["v"])
    assert not grown["v"][:, 4:].any()
    assert same["state"] is memory["state"]
    second, of_memory = cache.with_rows([layer, memory], [1])
    assert torch.equal(second["k"], layer["k"][1:])
    assert torch.equal(of_memory["state"], torch.tensor([[1.0]]))


def test_odd_heads_are_refused():
    sizes = {"d_model": 8, "d_ff": 8, "num_heads": 2, "num_kv_heads": 2, "norm_eps": 1e-6, "init_std": 0.02}
    with pytest.raises(ValueError, match="head_dim is 3 but rope turns pairs of channels; make it even"):
        DecoderConfig(head_dim=3, **sizes)


def positions_by_blocks(num_tokens, blocks):
    """`mrope` token by token: the next position is the largest of the token before plus 1."""
    positions_3T, place_of = torch.zeros(3, num_tokens), {}
    for tokens_M, places_3M in blocks:
        place_of[int(tokens_M[0])] = places_3M
    token, start = 0, 0.0
    while token < num_tokens:
        places_3M = place_of.get(token, torch.zeros(3, 1))
        positions_3T[:, token : token + places_3M.shape[1]] = places_3M + start
        start += float(places_3M[:, -1].max()) + 1
        token += places_3M.shape[1]
    return positions_3T


@pytest.mark.parametrize("step", [1.0, 0.5, 0.125])
def test_a_block_begins_behind_the_token_before_it(step):
    """Blocks at the start and the end, side by side and apart, of integer and of fractional places; or none."""
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for num_blocks in [0, *range(8)] * 5:
        blocks, place = [], draw(0, 2)
        for _ in range(num_blocks):
            size = draw(1, 9)
            blocks.append(
                (torch.arange(place, place + size), step * torch.randint(0, 9, (3, size), generator=generator))
            )
            place += size + draw(0, 4)
        num_tokens = place + draw(0, 5)
        got_3T = mrope(num_tokens, iter(blocks))
        assert got_3T.dtype == torch.float32
        assert torch.equal(got_3T, positions_by_blocks(num_tokens, blocks))


def test_positions_of_a_long_video_take_few_operations():
    """Less than two for each group of frames: loader threads share one interpreter."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    kinds_T = torch.tensor([TEXT, *[VIDEO] * 4] * 100)
    media = Media(inputs_UF=torch.zeros(1600, 1), grid=(100, 4, 4))
    sample = Sample(tokens_T=kinds_T, labels_T=kinds_T, kinds_T=kinds_T, videos=(media,))
    with Count() as count:
        positions_3T = mrope(500, patches.frame_blocks(sample, 2))
    assert positions_3T[:, -4:].tolist() == [[298.0] * 4, [298.0, 298, 299, 299], [298.0, 299] * 2]
    assert count.calls < 200
