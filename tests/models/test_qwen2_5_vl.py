"""Qwen2.5-VL: windows, absolute time, both generations of configs and of names, and the published models."""

import copy
import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

import mmfn
from mmfn import tree
from mmfn.batch import IGNORE, IMAGE, TEXT, VIDEO, Media, Sample
from mmfn.models import family, qwen2_5_vl
from mmfn.models.layers.patches import lay_windows
from mmfn.ops import portable
from mmfn.packing import Sizes
from mmfn.train.evidence.float64 import float64
from tests import oracles, tiny
from tests.batches import wide
from tests.goldens import make_name_goldens
from tests.oracles.models import block_positions

FAMILY = "qwen2_5_vl"
SIZES = {name: hf for name, hf in make_name_goldens.sizes().items() if hf["model_type"] == FAMILY}
OLDER = {"in_chans": 3, "spatial_patch_size": 14}  # in the tower's section of the files as they were published


def published(name="Qwen2.5-VL-3B"):
    """The config.json of a published model: the text's values lie beside the tower's section."""
    hf = copy.deepcopy(SIZES[name])
    hf["vision_config"] |= OLDER
    return hf


# ---- configs


@pytest.mark.parametrize("name", SIZES)
def test_published_models(name):
    hf = published(name)
    cfg = qwen2_5_vl.config_from_hf(hf)
    assert cfg == qwen2_5_vl.config_from_hf(SIZES[name])
    assert cfg.is_tied == ("head" not in qwen2_5_vl.specs(cfg)) == name.endswith("-3B")
    assert (cfg.rope_theta, cfg.rope_sections, cfg.decoder.head_dim) == (1e6, (16, 24, 24), 128)
    assert (cfg.decoder.biased, cfg.decoder.has_qk_norm, cfg.decoder.norm_eps) == (("q", "k", "v"), False, 1e-6)
    assert (cfg.vision.window, cfg.vision.frame_blocks) == (4, {7, 15, 23, 31})
    assert (cfg.vision.positions_per_second, cfg.block_end) == (2, (0, 1, 2))
    newer = oracles.transformers.Qwen2_5_VLConfig(**hf).to_dict()
    assert "hidden_size" not in newer
    assert qwen2_5_vl.config_from_hf(newer) == cfg


def test_defaults_are_those_of_transformers():
    text, vision = {"hidden_size": 4096, "num_attention_heads": 32}, {"out_hidden_size": 4096}
    sections = {"text_config": text, "vision_config": vision}
    got = qwen2_5_vl.config_from_hf(sections)
    assert got == qwen2_5_vl.config_from_hf(oracles.transformers.Qwen2_5_VLConfig(**sections).to_dict())
    assert (got.vision.d_model, got.vision.positions_per_second, got.decoder.norm_eps) == (3584, 4, 1e-5)
    nulls = {"num_key_value_heads": None, "layer_types": None, "rope_parameters": None}
    assert qwen2_5_vl.config_from_hf({**sections, "text_config": text | nulls}).decoder.num_kv_heads == 32
    assert qwen2_5_vl.config_from_hf({**sections, "text_config": text | {"tie_word_embeddings": True}}).is_tied


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window is True but must be False: text attends to all"),
        ({"layer_types": ["sliding_attention"] * 36}, r"layer_types is .* a list of 36 of \['full_attention'\]"),
        ({"head_dim": 64}, "head_dim is 64 but must be 128: the width is divided among the heads"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.type is 'yarn' but must be 'default'"),
        ({"rope_scaling": {"mrope_interleaved": True}}, "this family does not interleave its rope sections"),
        ({"rope_scaling": {"mrope_section": [4, 4, 4]}}, r"mrope_section is \[4, 4, 4\] but must be three numbers"),
        ({"mrope_block_end": "width"}, r"mrope_block_end is 'width' but must be one of \['height_width', 'time_h"),
        ({"tokens_per_second": 0}, "vision_config.tokens_per_second is 0 but must be an integer of at least 1"),
        ({"in_channels": 4}, "vision_config.in_chans is 3 but must be 4: it is another name"),
        ({"spatial_patch_size": 16}, "vision_config.spatial_patch_size is 16 but must be 14: it is another name"),
        ({"window_size": 27}, "vision_config.window_size is 27 but must be at least one merged cell of 2 x 14 pixels"),
        ({"fullatt_block_indexes": 7}, "vision_config.fullatt_block_indexes is 7 but must be a list of integers"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_type is 'default' but must be 'axial'"),
    ],
)
def test_what_is_not_supported_is_refused(edit, message):
    hf = published()
    (key,) = edit
    is_tower = key in hf["vision_config"] or key in ("in_channels", "rope_parameters")
    (hf["vision_config"] if is_tower else hf).update(edit)
    with pytest.raises(ValueError, match=message) as caught:
        qwen2_5_vl.config_from_hf(hf)
    assert "correct the model's config.json" in str(caught.value)


# ---- positions


def positions_of(model, inputs):
    return mmfn.batch_from_hf(inputs, model).positions_3T


@pytest.fixture(scope="module")
def models():
    """Of 28 random configs, with what transformers builds of each."""
    found = []
    for seed in range(28):
        oracle = oracles.build(oracles.random_config(seed, FAMILY), seed)
        found.append((oracle, mmfn.init(oracle.config.to_dict() | {"model_type": FAMILY}, seed=0)))
    return found


SECONDS = (1.0, 0.5, 1 / 3, 0.7, 2 / 29.97, 1.12)  # of which most give fractions


def test_positions_by_either_rule(models):
    """200 rows of media and words: the published rule, and the library's own where config.json asks for it."""
    r, num_rows, num_odd = random.Random(0), 0, 0
    for seed in range(68):
        oracle, model = models[seed % len(models)]
        inputs = oracles.inputs(oracle.config, seed, rows=3, images=3, videos=3)
        if "second_per_grid_ts" in inputs:
            inputs["second_per_grid_ts"] = torch.tensor([r.choice(SECONDS) for _ in inputs["second_per_grid_ts"]])
        is_token = inputs["attention_mask"].bool()
        published_3T = block_positions(oracle.config, inputs)[:, is_token].float()
        assert torch.equal(positions_of(model, inputs), published_3T)
        keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        index, _ = oracle.model.get_rope_index(
            *(inputs.get(key) for key in keys), attention_mask=inputs["attention_mask"]
        )
        as_library = replace(model, cfg=replace(model.cfg, block_end=qwen2_5_vl.BLOCK_ENDS["height_width"]))
        assert torch.equal(positions_of(as_library, inputs), index[:, is_token].float())
        num_rows += len(is_token)
        num_odd += not torch.equal(index[:, is_token].float(), published_3T)
    assert num_rows >= 200
    assert 10 < num_odd < 60


def film(*, seconds: float, steps: int = 8) -> Sample:
    """Two words, a video of 1 x 2 cells, three words."""
    kinds_T = torch.tensor([TEXT] * 2 + [VIDEO] * 2 * steps + [TEXT] * 3)
    tokens_T = torch.where(kinds_T == VIDEO, 2, 9)
    media = Media(inputs_UF=torch.zeros(8 * steps, 12), grid=(steps, 2, 4), seconds_per_grid=seconds)
    return Sample(tokens_T=tokens_T, labels_T=torch.full_like(tokens_T, IGNORE), kinds_T=kinds_T, videos=(media,))


def test_steps_in_time_are_rounded_down_and_text_goes_on_behind_them():
    model = tiny.model_of("windows")  # 2 positions per second
    got = qwen2_5_vl.positions(film(seconds=0.7), model.cfg).tolist()
    times = [2.0 + t for t in (0, 1, 2, 4, 5, 7, 8, 9)]
    assert got[0] == [0, 1, *(t for t in times for _ in range(2)), 12, 13, 14]
    assert got[1] == [0, 1, *[2] * 16, 12, 13, 14]
    assert got[2] == [0, 1, *[2, 3] * 8, 12, 13, 14]
    cfg = replace(model.cfg, block_end=(1, 2))
    assert qwen2_5_vl.positions(film(seconds=0.7), cfg)[:, -3:].tolist() == [[4, 5, 6]] * 3  # below the video's times


def test_a_video_must_say_how_long_its_steps_last():
    with pytest.raises(
        ValueError, match=r"a video with seconds_per_grid 0\.0 but each of its 8 steps in time must last"
    ):
        qwen2_5_vl.positions(film(seconds=0.0), tiny.model_of("windows").cfg)


# ---- windows


GRIDS = [(1, 8, 12), (1, 4, 4), (2, 20, 28), (3, 4, 2), (1, 2, 2), (1, 34, 46), (1, 98, 70)]


def still(grids, values: int = 1) -> Sample:
    """Images alone, whose patches are numbered."""
    media, first = [], 0
    for t, h, w in grids:
        inputs_UF = (torch.arange(first, first + t * h * w).float()[:, None]).expand(-1, values)
        media.append(Media(inputs_UF=inputs_UF, grid=(t, h, w)))
        first += t * h * w
    kinds_T = torch.full((first // 4,), IMAGE)
    return Sample(tokens_T=kinds_T, labels_T=kinds_T, kinds_T=kinds_T, images=tuple(media))


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_windows_are_those_of_the_library(window):
    laid = lay_windows(still(GRIDS), 2, 1, window)
    index_N, offsets = get_vision_window_index(torch.tensor(GRIDS), 2, window * 28, 14)
    order_P = torch.cat(laid.inputs)[:, 0].long()
    assert torch.equal(order_P[::4] // 4, index_N)
    assert torch.equal(order_P.view(-1, 4) - order_P[::4, None], torch.arange(4).expand(len(index_N), -1))
    assert list(laid.segments[0]) == offsets.diff().tolist()
    assert list(laid.segments[1]) == [h * w for t, h, w in GRIDS for _ in range(t)]
    assert laid.items == tuple(n // 4 for n in laid.segments[1])
    assert torch.equal(index_N[laid.index_T], torch.arange(len(index_N)))  # each token, its own feature
    plain = lay_windows(still(GRIDS), 2, 1, 1000)
    assert torch.equal(torch.cat(plain.inputs)[:, 0].long(), torch.arange(len(order_P)))
    assert torch.equal(laid.coords_P4, plain.coords_P4[order_P])


def test_blocks_see_windows_or_frames():
    """What a feature depends on: with no block over frames its window, with one its frame, and never another."""
    model = tiny.model_of("windows")
    sample = still([(1, 4, 6), (1, 4, 6)], model.cfg.vision.patch_values)
    laid = qwen2_5_vl.lay(sample, model.cfg)["vision"]
    tower = model.family.pack([sample], model.cfg).towers["vision"]
    inputs_UF = torch.randn(tower.inputs_UF.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for blocks, segments in ((frozenset(), laid.segments[0]), (frozenset({1}), laid.segments[1])):
        vision = replace(model.cfg.vision, frame_blocks=blocks)

        def features(x_UF: Tensor, vision=vision) -> Tensor:
            own = replace(tower, inputs_UF=x_UF)
            return qwen2_5_vl.encode(model.params["vision"], own, vision, portable()).sum(1)

        jacobian_NUF = torch.autograd.functional.jacobian(features, inputs_UF)
        reaches_NN = jacobian_NUF.abs().amax(2).view(12, 12, 4).amax(2) > 0
        id_N = torch.repeat_interleave(torch.tensor(segments) // 4)
        assert torch.equal(reaches_NN, id_N[:, None] == id_N)


def test_the_cost_of_a_frame_is_that_of_its_blocks():
    """FLOPs of whole frames, up to one factor; those of patches in a window grow with the window alone."""
    cfg = qwen2_5_vl.config_from_hf(published())
    kind = qwen2_5_vl.towers(cfg)["vision"]
    assert (kind.segments_per_unit, kind.inputs, kind.rows, kind.features) == ((1, 1), 4, 4, 1)

    def flops(num_patches: int) -> int:
        D, F = 1280, 3420
        return num_patches * (32 * (8 * D * D + 6 * D * F) + 4 * D * (4 * num_patches + 28 * 64))

    ratios = [flops(n) / (n * (n + kind.matmul_rows)) for n in (64, 1024, 16_384)]
    assert max(ratios) / min(ratios) == pytest.approx(1, rel=1e-4)
    assert (
        qwen2_5_vl.towers(replace(cfg, vision=replace(cfg.vision, frame_blocks=frozenset())))["vision"].matmul_rows
        > 1e5
    )


# ---- checkpoints


def test_files_of_either_generation_are_the_same_model(tmp_path):
    oracle = oracles.build(oracles.config(family=FAMILY, tie_word_embeddings=False))
    folder = oracles.save(oracle, tmp_path / "hub")
    stored = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"visual", "model", "lm_head"}
    assert not any(name.startswith(("model.visual", "model.language_model")) for name in stored)
    model = mmfn.load_hf(folder)
    mmfn.save_hf(tmp_path / "saved", model)
    again = load_file(tmp_path / "saved" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)
    newer = tmp_path / "newer"
    mmfn.save_hf(newer, model, layout="transformers")
    assert load_file(newer / "model.safetensors").keys() == dict(oracle.named_parameters()).keys()
    for path in (newer, tmp_path / "saved"):
        assert all(map(torch.equal, tree.leaves(mmfn.load_hf(path).params), tree.leaves(model.params)))
        back, info = type(oracle).from_pretrained(path, output_loading_info=True)
        assert not any(info.values())
        assert all(torch.equal(p, q) for p, q in zip(back.parameters(), oracle.parameters(), strict=True))


def test_an_older_config_loads_with_its_weights(tmp_path):
    oracle = oracles.build(oracles.config(family=FAMILY, tie_word_embeddings=True))
    folder = oracles.save(oracle, tmp_path)
    model = mmfn.load_hf(folder)
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    vision = config["vision_config"]
    vision |= {"in_chans": vision.pop("in_channels"), "spatial_patch_size": vision["patch_size"], "model_type": FAMILY}
    config = {**text, **config, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    older = mmfn.load_hf(folder)
    assert older.cfg == model.cfg
    assert all(map(torch.equal, tree.leaves(older.params), tree.leaves(model.params)))


def test_the_rule_of_config_json_reaches_training(tmp_path):
    oracle = oracles.build(oracles.config(family=FAMILY), 0, torch.float64)
    inputs = oracles.labelled(oracle.config, 4, rows=3, videos=2)
    inputs["second_per_grid_ts"] = torch.full_like(inputs["second_per_grid_ts"], 3.0)
    losses = {}
    for rule in qwen2_5_vl.BLOCK_ENDS:
        oracle.config.mrope_block_end = rule
        mmfn.save_hf(tmp_path / "saved" / rule, mmfn.load_hf(oracles.save(oracle, tmp_path / rule)))
        model = mmfn.load_hf(tmp_path / "saved" / rule)
        losses[rule] = mmfn.loss(model.params, wide(mmfn.batch_from_hf(inputs, model)), model)[0].item()
    with float64():
        want = oracle(**inputs_in(inputs, torch.float64), use_cache=False).loss.item()
    assert losses["height_width"] == pytest.approx(want, abs=1e-6)
    assert abs(losses["time_height_width"] - want) > 1e-3


def inputs_in(inputs, dtype):
    return {k: v.to(dtype) if k.startswith("pixel") else v for k, v in inputs.items()}


def test_a_batch_of_static_size_holds_windows_and_frames():
    model = tiny.model_of("windows")
    samples = tiny.random_samples(model, 3, 4)
    plain = model.family.pack(samples, model.cfg)
    sizes = Sizes(units={"vision": 64})
    batch = model.family.pack(samples, model.cfg, sizes)
    assert [s.num for s in batch.towers["vision"].segments] == [64, 64]
    for own, want in zip(batch.towers["vision"].segments, plain.towers["vision"].segments, strict=True):
        lengths = own.host_N.diff()
        assert lengths[lengths > 0].tolist() == want.host_N.diff().tolist()
    assert family(FAMILY).towers(model.cfg)["vision"].media == (IMAGE, VIDEO)
