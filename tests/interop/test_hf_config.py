"""Reading config.json: equal spellings, defaults of transformers, and settings that are refused."""

import copy

import pytest
import torch

import mmfn
from mmfn import spec, tree
from mmfn.models import family, qwen3_vl
from mmfn.models.hf_config import ConfigReader
from tests import oracles


@pytest.fixture
def hf():
    return oracles.config().to_dict()


def test_defaults_are_those_of_transformers():
    text = {"mrope_section": [24, 20, 20]}
    vision = {"out_hidden_size": 4096}
    got = qwen3_vl.config_from_hf({"text_config": {"rope_parameters": text}, "vision_config": vision})
    default = oracles.transformers.Qwen3VLConfig(vision_config=vision, text_config={"rope_parameters": text}).to_dict()
    assert got == qwen3_vl.config_from_hf(default)
    assert (got.rope_theta, got.decoder.head_dim, got.vision.deepstack) == (500_000.0, 128, (8, 16, 24))


def test_the_older_spelling_of_rope_reads_the_same(hf):
    new = qwen3_vl.config_from_hf(hf)
    rope = hf["text_config"].pop("rope_parameters")
    hf["text_config"]["rope_theta"] = rope.pop("rope_theta")
    hf["text_config"]["rope_scaling"] = rope
    hf["vision_config"].pop("rope_parameters")
    hf.pop("image_token_id")
    old = qwen3_vl.config_from_hf(hf | {"image_token_id": oracles.IMAGE_ID})
    assert old == new


def test_null_heads_follow_the_other_values(hf):
    hf["text_config"] |= {"num_key_value_heads": None, "head_dim": None, "hidden_size": 64, "num_attention_heads": 4}
    hf["vision_config"]["out_hidden_size"] = 64
    got = qwen3_vl.config_from_hf(hf)
    assert (got.decoder.num_kv_heads, got.decoder.head_dim) == (4, 16)


def test_the_outer_setting_rules_tying(hf):
    hf["text_config"]["tie_word_embeddings"] = False
    assert qwen3_vl.config_from_hf(hf).is_tied
    hf["tie_word_embeddings"] = False
    assert not qwen3_vl.config_from_hf(hf).is_tied


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("text_config", {"hidden_act": "gelu"}, "text_config.hidden_act is 'gelu' but must be 'silu'"),
        ("text_config", {"hidden_size": "36"}, "text_config.hidden_size is '36' but must be an integer of at least 1"),
        ("text_config", {"num_hidden_layers": 0}, "text_config.num_hidden_layers is 0 but must be an integer"),
        ("text_config", {"rms_norm_eps": -1}, "text_config.rms_norm_eps is -1 but must be a finite number"),
        ("text_config", {"rms_norm_eps": float("inf")}, "text_config.rms_norm_eps is inf but must be a finite number"),
        ("text_config", {"rms_norm_eps": 10**400}, "rms_norm_eps is 10+ but must be a finite number"),
        ("text_config", {"attention_bias": 1}, "text_config.attention_bias is 1 but must be true or false"),
        ("text_config", {"attention_dropout": 0.1}, "text_config.attention_dropout is 0.1 but must be 0.0"),
        ("text_config", {"num_key_value_heads": 3}, "num_attention_heads is 4 but must be a multiple of"),
        ("text_config", {"head_dim": 12}, r"mrope_section is \[4, 2, 2\] but must be three numbers that add up"),
        ("text_config", {"pad_token_id": 97}, "text_config.pad_token_id is 97 but must be below vocab_size 97"),
        ("text_config", {"rope_parameters": 3}, "text_config.rope_parameters is 3 but must be a mapping"),
        ("vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act is 'relu' but must be one of"),
        ("vision_config", {"hidden_size": 20}, r"vision hidden_size is 20 but must be a multiple of 4 \* num_heads"),
        ("vision_config", {"out_hidden_size": 20}, "vision_config.out_hidden_size is 20 but must equal"),
        ("vision_config", {"patch_size": [2, 2]}, r"vision_config.patch_size is \[2, 2\] but must be an integer"),
        ("vision_config", {"deepstack_visual_indexes": [-1]}, "deepstack_visual_indexes is .* list of integers"),
        ("vision_config", {"deepstack_visual_indexes": [0, 0]}, "names a block twice"),
        ("vision_config", {"rope_parameters": {"rope_type": "default"}}, "rope_type is 'default' but must be 'axial'"),
    ],
)
def test_what_is_not_supported_is_refused(hf, section, values, message):
    hf[section] |= values
    with pytest.raises(ValueError, match=message) as caught:
        qwen3_vl.config_from_hf(hf)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_type": "yarn"}, "text_config.rope_parameters.rope_type is 'yarn' but must be 'default'"),
        ({"mrope_interleaved": False}, "mrope_interleaved is False but must be True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5 but must be 1.0"),
        ({"mrope_section": [4, 4]}, r"mrope_section is \[4, 4\] but must be three"),
        ({"rope_theta": 0}, "rope_theta is 0 but must be a finite number of at least 1"),
    ],
)
def test_rope_that_is_not_supported_is_refused(hf, values, message):
    hf["text_config"]["rope_parameters"] |= values
    with pytest.raises(ValueError, match=message):
        qwen3_vl.config_from_hf(hf)


def test_older_rope_scaling_that_is_not_supported_is_refused(hf):
    hf["text_config"].pop("rope_parameters")
    hf["text_config"]["rope_scaling"] = {"type": "linear", "factor": 2.0, "mrope_section": [4, 2, 2]}
    with pytest.raises(ValueError, match=r"rope_scaling.type is 'linear' but must be 'default'"):
        qwen3_vl.config_from_hf(hf)


def test_quantized_and_unknown_models_are_refused(hf):
    with pytest.raises(ValueError, match=r"quantization_config is .* quantized weights are not supported"):
        mmfn.init(hf | {"quantization_config": {"bits": 4}})
    with pytest.raises(ValueError, match="model_type 'qwen3vl' is not supported; nearest is 'qwen3_vl'"):
        mmfn.init(hf | {"model_type": "qwen3vl"})
    with pytest.raises(ValueError, match="model_type is None but must name a model family"):
        mmfn.init({})
    with pytest.raises(ValueError, match=r"hf_config is a Qwen3VLConfig but must be the dict .* pass its to_dict\(\)"):
        mmfn.init(oracles.config())


def test_init_draws_as_transformers_does(hf):
    hf["text_config"] |= {"initializer_range": 0.05, "attention_bias": True, "vocab_size": 3000}
    hf["vision_config"] |= {"initializer_range": 0.1, "num_position_embeddings": 900}
    params = mmfn.init(hf, seed=1).params
    assert params["text"]["embed"]["weight"].std().item() == pytest.approx(0.05, rel=0.02)
    assert params["vision"]["positions"]["weight"].std().item() == pytest.approx(0.1, rel=0.02)
    for path, leaf in tree.items(params):
        if path.endswith("bias"):
            assert not leaf.any(), path
        elif "norm" in path:
            assert (leaf == 1).all(), path
        else:
            assert leaf.std() > 0.03, path


def test_init_depends_on_the_seed_alone(hf):
    before = copy.deepcopy(hf)
    first, again, other = (mmfn.init(hf, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(first.params), tree.leaves(again.params), strict=True))
    assert not torch.equal(first.params["text"]["embed"]["weight"], other.params["text"]["embed"]["weight"])
    assert hf == before
    assert tree.leaves(mmfn.init(hf, dtype=torch.bfloat16).params)[0].dtype == torch.bfloat16
    assert spec.num_params(family("qwen3_vl").specs(first.cfg)) == sum(p.numel() for p in tree.leaves(first.params))


def test_choices_and_lists_of_them():
    kinds = ["full_attention", "linear_attention"]
    reader = ConfigReader({"act": "gelu", "layer_types": kinds, "odd": ["gelu"], "none": None}, "text_config")
    assert reader.choice("act", {"gelu": 1, "silu": 2}, "silu") == 1
    assert reader.choice("none", {"gelu": 1, "silu": 2}, "silu") == 2
    assert reader.strings("layer_types", kinds, 2, ()) == tuple(kinds)
    assert reader.strings("none", kinds, 3, kinds[:1] * 3) == ("full_attention",) * 3
    for key in ("act", "odd"):
        with pytest.raises(
            ValueError, match=rf"text_config.{key} is .* but must be one of \['relu', 'silu'\]; correct"
        ):
            reader.choice(key, {"silu": 1, "relu": 2}, "silu")
    for key, length in (("act", 4), ("layer_types", 3), ("odd", 1)):
        with pytest.raises(ValueError, match=rf"text_config.{key} is .* but must be a list of {length} of \['full_att"):
            reader.strings(key, kinds, length, ())
