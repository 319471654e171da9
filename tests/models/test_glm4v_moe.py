"""GLM-4.5V: kinds of tokens by context, images and videos in one batch, routers and their bias, its checkpoints."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.models.glm4v_moe.modeling_glm4v_moe import load_balancing_loss_func

import mmfn
from mmfn import spec, tree
from mmfn.batch import IMAGE, TEXT, VIDEO
from mmfn.interop.inputs import samples_from_hf
from mmfn.models import family, glm4v_moe
from mmfn.ops import portable
from mmfn.parallel.program import Program
from mmfn.train import optim
from mmfn.train.evidence.float64 import float64
from mmfn.train.schedule import schedule
from mmfn.train.step import init_state, make_step
from tests import oracles, tiny
from tests.batches import packed, wide
from tests.oracles import ATOL, RTOL

FAMILY = "glm4v_moe"
PUBLISHED = json.loads((Path(__file__).parents[2] / "configs/models/GLM-4.5V/config.json").read_text(encoding="utf-8"))
ROUTED = {"num_hidden_layers": 3, "output_router_logits": True, "router_aux_loss_coef": 0.2}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    oracle = oracles.build(oracles.config(family=FAMILY, text=ROUTED))
    return oracle, mmfn.load_hf(oracles.save(oracle, tmp_path_factory.mktemp("pair")))


def gradients_of(oracle, value):
    oracle.zero_grad()
    value.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in oracle.named_parameters()}


# ---- images and videos


def test_kinds_are_those_of_the_processor():
    """Of tokens in any order: videos that do not end, ends without a start, and frames of one video in another."""
    cfg = tiny.model_of("glm").cfg
    reader = type("Reader", (), {"image_token_id": 1, "video_start_id": 3, "video_end_id": 4})
    seen = set()
    for seed in range(50):
        tokens_T = torch.randint(0, 6, (40,), generator=torch.Generator().manual_seed(seed))
        (want,) = Glm4vProcessor.create_mm_token_type_ids(reader, [tokens_T.tolist()])
        assert glm4v_moe.kinds(tokens_T, cfg).tolist() == want
        seen |= set(want)
    assert seen == {TEXT, IMAGE, VIDEO}


def test_a_batch_of_both_kinds_is_each_of_them_alone(pair):
    """The library refuses the mixture of one row; rows of one kind, which it takes, agree, and so do mixed rows with
    calls in which every frame is an image."""
    oracle, model = pair
    both = oracles.inputs(oracle.config, 2, rows=1, images=3, videos=3)
    assert {"pixel_values", "pixel_values_videos"} <= both.keys()
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        oracle(**both, use_cache=False)
    images, videos = ({"rows": 1, "images": 3 * (1 - kind), "videos": 3 * kind} for kind in (0, 1))
    rows = [oracles.inputs(oracle.config, seed, **most) for most in (images, videos) for seed in range(4)]
    assert {key for row in rows for key in row if "pixel" in key} == {"pixel_values", "pixel_values_videos"}
    samples = [one for row in (*rows, both) for one in samples_from_hf(row, model)]
    got_TV = mmfn.logits(model, packed(model, samples))
    alone = [oracle(**row, use_cache=False).logits[0] for row in rows]
    want_TV = torch.cat([*alone, oracles.real_logits(oracle, both)]).detach()
    torch.testing.assert_close(got_TV, want_TV, rtol=RTOL, atol=ATOL)


def test_packed_equals_separate_rows_in_float64():
    """Text, images, videos and mixtures of them: logits and the gradient of every parameter."""
    model = tiny.model_of("glm", 3)
    kinds = ((), (IMAGE,), (VIDEO,), (VIDEO, IMAGE, VIDEO), (IMAGE, IMAGE))
    samples = [tiny.sample(model.family, model.cfg, i, media) for i, media in enumerate(kinds)]
    assert all(torch.equal(glm4v_moe.kinds(s.tokens_T, model.cfg), s.kinds_T) for s in samples)
    weights_TV = torch.randn(sum(s.tokens_T.numel() for s in samples), 61, dtype=torch.float64)

    def projected(params, batch, own_TV):
        return (mmfn.logits(replace(model, params=params), batch) * own_TV).sum()

    differentiate = mmfn.value_and_grad(projected)
    value, grads = differentiate(model.params, wide(packed(model, samples)), weights_TV)
    parts = weights_TV.split([s.tokens_T.numel() for s in samples])
    alone = [differentiate(model.params, wide(packed(model, [s])), x) for s, x in zip(samples, parts, strict=True)]
    torch.testing.assert_close(value, sum(one for one, _ in alone), rtol=1e-11, atol=1e-11)
    for got, *own in zip(tree.leaves(grads), *(tree.leaves(own) for _, own in alone), strict=True):
        torch.testing.assert_close(got, sum(own), rtol=1e-11, atol=1e-11)


def test_blocks_of_patches_are_merged_by_the_convolution():
    model = tiny.model_of("glm")
    cfg, params = model.cfg.vision, model.params["vision"]["merger"]
    x_PD = torch.randn(3 * cfg.merged, cfg.d_model, dtype=torch.float64)
    stored = model.family.key_map(model.cfg).disk_tensors(model.family.specs(model.cfg))[
        "model.visual.downsample.weight"
    ]
    blocks = x_PD.view(3, cfg.merge_size, cfg.merge_size, cfg.d_model).permute(0, 3, 1, 2)
    down = params["downsample"]
    x = F.conv2d(blocks, stored.to_disk(down["weight"]), down["bias"], stride=cfg.merge_size).flatten(1)
    weight, bias = params["norm"]["weight"], params["norm"]["bias"]
    x = F.gelu(F.layer_norm(x @ params["proj"]["weight"].T, (cfg.d_out,), weight, bias, 1e-5))
    want = (F.silu(x @ params["gate"]["weight"].T) * (x @ params["up"]["weight"].T)) @ params["down"]["weight"].T
    torch.testing.assert_close(glm4v_moe.merge(params, x_PD, cfg, portable()), want, rtol=1e-12, atol=1e-12)


# ---- routers


@pytest.mark.parametrize("seed", range(6))
def test_losses_and_their_gradients_equal_transformers(seed, tmp_path):
    """With the load-balancing loss, which judges a softmax of the logits that does not choose here."""
    config = oracles.random_config(seed + 200, FAMILY)
    config.text_config.output_router_logits = True
    config.text_config.router_aux_loss_coef = 0.3
    oracle = oracles.build(config, seed, torch.float64)
    inputs = oracles.labelled(oracle.config, seed, rows=1 + seed % 3, pad=("right", "left")[seed % 2])
    model = mmfn.load_hf(oracles.save(oracle, tmp_path))
    batch = wide(mmfn.batch_from_hf(inputs, model))
    out = oracles.run(oracle, inputs, output_router_logits=True)
    with float64():
        (value, metrics), grads = mmfn.value_and_grad(mmfn.loss, has_aux=True)(model.params, batch, model)
    torch.testing.assert_close(value, out.loss.detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(metrics["aux_loss"], out.aux_loss.detach(), rtol=1e-11, atol=1e-11)
    got, want = mmfn.to_hf(grads, model, "transformers"), gradients_of(oracle, out.loss)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_the_judged_loads_are_not_those_that_were_chosen(pair):
    """The library's loss is no function of where tokens went: it counts the experts that softmax would take."""
    oracle, model = pair
    batch = mmfn.batch_from_hf(oracles.inputs(oracle.config, 4, rows=2), model)
    found = []

    def layer(block, params, *xs):
        x, out = block(params, *xs)
        found.append(out["router"] if isinstance(out, dict) else None)
        return x, out

    output = model.family.apply(model.params, batch, model.cfg, replace(portable(), layer=layer))
    routed = [one for one in found if one is not None]
    assert len(routed) == 2
    assert any(not torch.equal(one["counts_E"], one["judged_E"]) for one in routed)
    assert all(one["counts_E"].sum() == one["judged_E"].sum() == 2 * one["rows"] for one in routed)
    logits = oracles.run(oracle, oracles.inputs(oracle.config, 4, rows=2), output_router_logits=True).router_logits
    mask = oracles.inputs(oracle.config, 4, rows=2)["attention_mask"]
    want = load_balancing_loss_func(logits, 8, 2, mask)
    torch.testing.assert_close(output.losses["aux_loss"](), want.detach(), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(("rate", "is_finite"), [(0.0, True), (0.01, True), (0.01, False)])
def test_a_step_moves_the_bias_by_the_loads_where_it_is_told_to(rate, is_finite):
    """By the sign of mean less count, counts of all micro-batches; never in a step that is not taken."""
    hf = tiny.TINY["glm"](3)
    hf["text_config"]["router_bias_update_rate"] = rate
    model = replace(tiny.model_of("glm", 3), cfg=glm4v_moe.config_from_hf(hf), hf_config=hf)
    batches = [wide(packed(model, tiny.random_samples(model, seed, 3))) for seed in (1, 2)]
    params = tree.map(lambda leaf: leaf.clone(), model.params)
    if not is_finite:
        params["head"]["weight"].fill_(torch.nan)
    paths = [path for path in tree.paths(params) if path.endswith("choice_bias")]
    assert len(paths) == 2
    before = {path: leaf.clone() for path, leaf in tree.items(params) if path in paths}
    counting = replace(model, cfg=replace(model.cfg, bias_rate=1.0))
    outputs = [model.family.apply(model.params, one, counting.cfg, portable()) for one in batches]
    step = make_step(
        model.family,
        model.cfg,
        Program.of(model.family.specs(model.cfg)),
        "per_token_loss",
        writer := optim.adamw(),
        schedule=schedule("constant", peak=1e-3, num_steps=1),
    )
    state, _ = step(init_state(params, writer), batches)
    after = dict(tree.items(state["params"]))
    for path in paths:
        counts_E = sum(output.counts[path] for output in outputs)
        change_E = rate * torch.sign(counts_E.mean() - counts_E)
        assert bool(change_E.any()) == (rate > 0)
        assert after[path].dtype == before[path].dtype == torch.float64  # the model's, which is wider than float32
        want_E = before[path] + (change_E if is_finite else 0.0)
        torch.testing.assert_close(after[path], want_E, rtol=0, atol=1e-12)


def test_without_a_rate_nothing_is_counted():
    cfg = glm4v_moe.config_from_hf(PUBLISHED)
    assert (cfg.bias_rate, cfg.moe.bias_rule, glm4v_moe.rules(cfg)) == (0.0, "", {})
    assert not spec.rules_of(glm4v_moe.specs(cfg))


# ---- checkpoints


def test_experts_lie_one_by_one_and_the_bias_keeps_float32(pair, tmp_path):
    """What is saved loads in transformers with equal logits, and a layer behind the last passes through."""
    oracle, _ = pair
    narrow = oracles.build(oracle.config).bfloat16()
    for buffer, exact in zip(narrow.buffers(), oracle.buffers(), strict=True):
        buffer.data = exact.data.clone()  # the library keeps it wide where it loads a file
    source = oracles.save(narrow, tmp_path / "source")
    beside = {f"model.language_model.layers.3.{name}": torch.randn(3, 5).bfloat16() for name in ("eh_proj", "enorm")}
    stored = load_file(source / "model.safetensors")
    save_file(stored | beside, source / "model.safetensors", metadata={"format": "pt"})
    model = mmfn.load_hf(source)
    path = "text/layers/1/moe/router/choice_bias"
    assert {str(x.dtype) for p, x in tree.items(model.params) if p != path and "choice" not in p} == {"torch.bfloat16"}
    assert dict(tree.items(model.params))[path].dtype == torch.float32
    inputs = oracles.inputs(oracle.config, 1, rows=1, videos=0)
    for layout in ("hub", "transformers"):
        mmfn.save_hf(tmp_path / layout, model, layout=layout, assets=source)
        index = json.loads((tmp_path / layout / "model.safetensors.index.json").read_text())["weight_map"]
        files = {name: x for file in set(index.values()) for name, x in load_file(tmp_path / layout / file).items()}
        experts = [name for name in files if ".experts." in name]
        assert len(experts) == (2 * 8 * 3 if layout == "hub" else 2 * 2)
        assert files["model.language_model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
        assert all(torch.equal(files[name], value) for name, value in beside.items())
        if layout == "hub":
            assert files.keys() == stored.keys() | beside.keys()
            assert all(torch.equal(files[name], value) for name, value in stored.items())
        again = mmfn.load_hf(tmp_path / layout)
        pairs = zip(tree.items(again.params), tree.items(model.params), strict=True)
        assert all(p == q and torch.equal(x, y) and x.dtype == y.dtype for (p, x), (q, y) in pairs)
    for layout in ("hub", "transformers"):
        wide_model = mmfn.load_hf(oracles.save(oracle, tmp_path / "wide"))
        mmfn.save_hf(tmp_path / f"{layout} wide", wide_model, layout=layout)
        back = type(oracle).from_pretrained(
            tmp_path / f"{layout} wide", attn_implementation="eager", experts_implementation="eager"
        )
        assert all(
            torch.equal(x, y) for x, y in zip(back.state_dict().values(), oracle.state_dict().values(), strict=True)
        )
        torch.testing.assert_close(oracles.real_logits(back, inputs), oracles.real_logits(oracle, inputs))


@pytest.mark.parametrize("layout", ["hub", "transformers"])
def test_a_block_that_the_config_does_not_count_is_refused(pair, layout, tmp_path):
    """It is no layer that predicts further tokens, which would pass through."""
    _, model = pair
    mmfn.save_hf(tmp_path / "short", model, layout=layout)
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] -= 1
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers\.2\..* belongs to no parameter; .*config and weights must belong"):
        mmfn.load_hf(tmp_path / "short")


def test_the_published_model_parses():
    """Names and counts of its file: test_published.py. Here as the library holds it, experts stacked."""
    cfg = glm4v_moe.config_from_hf(PUBLISHED)
    assert (cfg.num_layers, cfg.moe.num_experts, cfg.moe.num_chosen, cfg.moe.d_shared) == (46, 128, 8, 1408)
    assert (cfg.decoder.head_dim, cfg.rotary_dim, cfg.rope_sections, cfg.is_tied) == (128, 64, (8, 12, 12), False)
    assert (cfg.vision.num_positions, cfg.vision.d_ff, cfg.vision.d_merger) == (576, 4096, 10944)
    with torch.device("meta"):
        oracle = transformers.Glm4vMoeForConditionalGeneration(transformers.Glm4vMoeConfig.from_dict(PUBLISHED))
    held = glm4v_moe.key_map(cfg).disk_tensors(glm4v_moe.specs(cfg), "transformers")
    assert {name: tensor.shape for name, tensor in held.items()} == {
        name: tuple(x.shape) for name, x in oracle.state_dict().items()
    }


def test_defaults_are_those_of_transformers():
    text = {"head_dim": 128}  # that of its class, 4096 / 96, has an odd number of channels that turn
    got = glm4v_moe.config_from_hf({"text_config": text})
    default = transformers.Glm4vMoeConfig(text_config=text).to_dict()
    assert got == glm4v_moe.config_from_hf(default)
    assert (got.decoder.head_dim, got.rotary_dim, got.decoder.biased, got.moe.num_experts) == (
        128,
        64,
        ("q", "k", "v"),
        128,
    )


def test_ties_are_found_where_older_files_have_them():
    hf = tiny.TINY["glm"](2)
    assert not glm4v_moe.config_from_hf(hf).is_tied
    hf["text_config"]["tie_word_embeddings"] = True
    assert glm4v_moe.config_from_hf(hf).is_tied
    assert transformers.Glm4vMoeConfig.from_dict(hf).tie_word_embeddings


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("vision_config", {"attention_bias": True}, "vision_config.attention_bias is True but must be False"),
        ("vision_config", {"hidden_act": "gelu"}, "vision_config.hidden_act is 'gelu' but must be 'silu'"),
        ("vision_config", {"image_size": 1}, "vision_config.image_size is 1 but must be an integer of at least 2"),
        ("text_config", {"topk_group": 5}, "num_chosen_groups is 5 but must be in"),
        ("text_config", {"n_group": 3}, "n_group is 3 but must divide 8, the number of experts"),
        ("text_config", {"first_k_dense_replace": -1}, "first_k_dense_replace is -1 but must be an integer"),
        ("text_config", {"router_bias_update_rate": -1}, "router_bias_update_rate is -1 but must be a finite number"),
        ("text_config", {"use_qk_norm": True}, "text_config.use_qk_norm is True but must be False"),
    ],
)
def test_what_is_not_supported_is_refused(section, values, message):
    hf = tiny.TINY["glm"](2)
    hf[section] |= values
    with pytest.raises(ValueError, match=message) as caught:
        glm4v_moe.config_from_hf(hf)
    assert "\n" not in str(caught.value)


def test_the_first_blocks_are_dense():
    for dense, num_layers in ((0, 2), (1, 3), (3, 3), (5, 3)):
        hf = tiny.TINY["glm"](num_layers)
        hf["text_config"]["first_k_dense_replace"] = dense
        found = family(FAMILY)
        cfg = found.config_from_hf(hf)
        blocks = found.specs(cfg)["text"]["layers"]
        assert ["moe" in block for block in blocks] == [i >= dense for i in range(num_layers)]
        assert found.taps(cfg) == min(dense, num_layers)
