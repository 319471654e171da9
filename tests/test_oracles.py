"""The oracles themselves, of every model type: what tests hold against mmfn is what they claim."""

from collections import Counter

import pytest
import torch

from mmfn.models import FAMILIES
from tests import oracles
from tests.oracles.conversations import is_heard_and_seen

TYPES = oracles.TYPES
SEEDS = range(28)
SILENT = ("audio_tower", "k_proj.bias")  # a bias of keys shifts all scores of a query alike, where keys do not turn


def test_every_family_is_held_against_the_library():
    assert set(FAMILIES) == set(oracles.TYPES)


@pytest.fixture(scope="module", params=TYPES)
def oracle(request):
    return oracles.build(oracles.config(family=request.param), 0, torch.float64)


def test_every_parameter_gets_a_gradient_from_a_batch_of_all_media(oracle):
    inputs = oracles.labelled(oracle.config, 3, rows=3)
    kinds = set(oracles.kinds_of(inputs).unique().tolist())
    assert kinds == ({0, 1, 2, 3} if "input_features" in inputs else {0, 1, 2})
    out = oracles.run(oracle, inputs)
    assert out.logits.dtype == out.loss.dtype == torch.float64
    oracle.zero_grad()
    out.loss.backward()
    for name, p in oracle.named_parameters():
        assert p.grad is not None, name
        is_silent = all(part in name for part in SILENT)
        assert (p.grad.abs().max().item() < 1e-15) == is_silent, name


@pytest.mark.parametrize("seed", range(4))
def test_neither_padding_nor_other_rows_matter(oracle, seed):
    limits = {"rows": 3, "sound": False} if seed % 2 else {"rows": 3}
    right, left = (oracles.labelled(oracle.config, seed, pad=pad, **limits) for pad in ("right", "left"))
    want_TV = oracles.real_logits(oracle, right)
    alone_TV = torch.cat([oracles.real_logits(oracle, row) for row in oracles.rows_of(right)])
    for got_TV in (oracles.real_logits(oracle, left), alone_TV):
        torch.testing.assert_close(got_TV, want_TV, rtol=1e-11, atol=1e-11)
    losses = [oracles.run(oracle, inputs).loss for inputs in (left, right)]
    torch.testing.assert_close(*losses, rtol=1e-13, atol=1e-13)


def test_rows_are_the_batch_taken_apart(oracle):
    inputs = oracles.labelled(oracle.config, 5, rows=4, images=3, videos=2)
    rows = oracles.rows_of(inputs)
    for key, value in inputs.items():
        parts = [row[key] for row in rows if key in row]
        if key in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
            parts, value = [part[0] for part in parts], value[inputs["attention_mask"].bool()]
        assert torch.equal(torch.cat(parts), value), key


def test_float32_is_near(oracle):
    """A model in float32 differs by its rounding alone, so both have the same weights and inputs."""
    inputs = oracles.inputs(oracle.config, 2, rows=2)
    narrow = oracles.build(oracle.config, 0)
    narrow.load_state_dict(oracle.state_dict())
    atol = oracles.narrow_atol(oracles.model_type(oracle.config))
    got_TV, want_TV = oracles.real_logits(narrow, inputs), oracles.real_logits(oracle, inputs).float()
    torch.testing.assert_close(got_TV, want_TV, rtol=oracles.RTOL, atol=atol)


@pytest.mark.parametrize("family", TYPES)
def test_random_configs_cover_what_they_claim(family):
    configs = [oracles.random_config(seed, family) for seed in SEEDS]
    texts, visions = [c.text_config for c in configs], [c.vision_config for c in configs]
    assert {t.num_attention_heads // t.num_key_value_heads for t in texts} == {1, 2, 3}
    assert {c.tie_word_embeddings for c in configs} == {True, False}
    assert {v.spatial_merge_size for v in visions} == {1, 2, 3}
    assert len({tuple(t.rope_parameters["mrope_section"]) for t in texts}) >= 5
    assert len({t.hidden_size for t in texts}) >= 4
    special = {
        "qwen3_vl": _covers_taps,
        "qwen3_vl_moe": _covers_experts,
        "qwen2_5_vl": _covers_windows,
        "qwen3_5": _covers_delta,
        "qwen3_5_moe": _covers_delta,
        "qwen3_omni_moe": _covers_sound,
        "glm4v_moe": _covers_groups,
    }
    special[family](configs)


def _covers_taps(configs):
    assert {c.text_config.attention_bias for c in configs} == {True, False}
    taps = [c.vision_config.deepstack_visual_indexes for c in configs]
    assert [] in taps
    assert any(len(t) > 1 and list(t) != sorted(t) for t in taps)
    assert any(max(t, default=0) >= c.vision_config.depth for t, c in zip(taps, configs, strict=True))


def _covers_experts(configs):
    _covers_taps(configs)
    texts = [c.text_config for c in configs]
    assert {t.num_experts_per_tok for t in texts} == {1, 2, 3, 4}
    assert len({t.num_experts for t in texts}) >= 8
    assert {t.decoder_sparse_step for t in texts} == {1, 2}
    assert any(t.mlp_only_layers for t in texts)


def _covers_windows(configs):
    visions = [c.vision_config for c in configs]
    cells = [(v.window_size, v.patch_size * v.spatial_merge_size) for v in visions]
    assert {window // cell for window, cell in cells} == {1, 2, 3}
    assert any(window % cell for window, cell in cells)
    assert any(not v.fullatt_block_indexes for v in visions)
    assert any(set(range(v.depth)) <= set(v.fullatt_block_indexes) for v in visions)
    assert any(max(v.fullatt_block_indexes, default=0) >= v.depth for v in visions)
    assert {v.tokens_per_second for v in visions} == {1, 2, 4}


def _covers_delta(configs):
    texts = [c.text_config for c in configs]
    kinds = Counter(kind for t in texts for kind in t.layer_types)
    assert min(kinds["linear_attention"], kinds["full_attention"]) > 10
    assert {len(set(t.layer_types)) for t in texts} == {1, 2}
    assert {t.rope_parameters["partial_rotary_factor"] for t in texts} == {0.25, 0.5, 1.0}
    assert {t.linear_num_value_heads // t.linear_num_key_heads for t in texts} == {1, 2, 3}
    assert {t.linear_conv_kernel_dim for t in texts} == {2, 3, 4}


def _covers_sound(configs):
    _covers_experts(configs)
    audios = [c.audio_config for c in configs]
    assert {a.n_window_infer for a in audios} == {100, 200, 400}
    assert {c.text_config.norm_topk_prob for c in configs} == {True, False}
    assert {c.position_id_per_seconds for c in configs} == {13, 25}
    calls = [oracles.inputs(c, seed) for seed, c in enumerate(configs)]
    assert {is_heard_and_seen(call) for call in calls} == {True, False}


def _covers_groups(configs):
    texts = [c.text_config for c in configs]
    assert {(t.n_group, t.topk_group) for t in texts} >= {(1, 1), (2, 1), (4, 2)}
    assert {t.first_k_dense_replace for t in texts} >= {0, 1}
    assert {t.n_shared_experts for t in texts} == {1, 2}
    assert {t.norm_topk_prob for t in texts} == {True, False}
    assert len({c.vision_config.image_size // c.vision_config.patch_size for c in configs}) == 4


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_saved_model_is_what_the_library_loads(oracle, size, tmp_path):
    folder = oracles.save(oracle, tmp_path, max_shard_size=size)
    assert len(list(folder.glob("*.safetensors"))) > 1 or size == "5GB"
    back, info = oracles.oracle_class(oracle.config).from_pretrained(
        folder, config=oracle.config, dtype=torch.float64, output_loading_info=True
    )
    assert not any(info.values())
    want = oracle.state_dict()
    assert back.state_dict().keys() == want.keys()
    for name, value in back.state_dict().items():
        assert torch.equal(value, want[name].to(value.dtype)), name
