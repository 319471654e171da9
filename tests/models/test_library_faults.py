"""Where transformers 5.23 is wrong or ambiguous: each fault as the library shows it, for which mmfn deviates.

A test that fails after an upgrade says that a fault is gone, and with it a reason to differ.
"""

from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mmfn.train.evidence.float64 import float64
from tests import oracles
from tests.oracles.conversations import AUDIO, VIDEO, interleave, num_audio_tokens
from tests.oracles.models import block_positions, frames_as_images
from tests.oracles.recipes import (
    AUDIO_END_ID,
    AUDIO_ID,
    AUDIO_START_ID,
    END_ID,
    START_ID,
    VIDEO_ID,
)

WORD = 20


def model_of(family, **kwargs):
    return oracles.build(oracles.config(family=family, **kwargs), 0, torch.float64)


def one_row(ids, **media):
    ids_1S = torch.tensor([ids])
    return {"input_ids": ids_1S, "attention_mask": torch.ones_like(ids_1S), **media}


def logits(model, **inputs):
    with float64():
        return model(**inputs, use_cache=False).logits.detach()


# ---- Qwen2.5-VL


@pytest.fixture(scope="module")
def film():
    """Qwen2.5-VL and a row with a video of 8 steps, 2 seconds each, between words."""
    model = model_of("qwen2_5_vl")
    ids = [WORD, WORD, START_ID, *[VIDEO_ID] * 8, END_ID, WORD]
    grid = torch.tensor([[8, 2, 2]])
    width = 3 * 2 * model.config.vision_config.patch_size**2
    pixels = torch.randn(32, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kinds = torch.tensor([[2 * (i == VIDEO_ID) for i in ids]])
    seconds = torch.tensor([2.0])
    return model, one_row(
        ids, mm_token_type_ids=kinds, video_grid_thw=grid, pixel_values_videos=pixels, second_per_grid_ts=seconds
    )


def test_text_after_a_video_starts_before_the_video_ends(film):
    model, inputs = film
    keys = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    library, _ = model.model.get_rope_index(**{key: inputs[key] for key in keys})
    published = block_positions(model.config, inputs)
    assert library[0, 0].tolist() == [0, 1, 2, *range(3, 35, 4), 4, 5]
    assert published[0, 0].tolist() == [0, 1, 2, *range(3, 35, 4), 32, 33]
    assert torch.equal(library[..., :11], published[..., :11])
    ours = logits(model, **inputs, position_ids=published)
    assert (logits(model, **inputs) - ours)[0, -1].abs().max() > 0.1
    assert torch.equal(logits(model, **inputs, position_ids=library), logits(model, **inputs))


@pytest.mark.parametrize("seed", range(6))
def test_without_videos_the_published_rule_is_the_library_s(film, seed):
    model, _ = film
    inputs = oracles.inputs(model.config, seed, rows=3, images=4, videos=0)
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    library, _ = model.model.get_rope_index(**{key: inputs[key] for key in keys if key in inputs})
    assert torch.equal(library, block_positions(model.config, inputs))


def test_without_kinds_positions_are_silently_those_of_text(film):
    model, inputs = film
    rest = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}
    length = inputs["input_ids"].shape[1]
    flat = torch.arange(length).expand(3, 1, -1)
    assert torch.equal(logits(model, **rest), logits(model, **rest, position_ids=flat))


# ---- packing


@pytest.mark.parametrize(
    ("family", "num_axes", "is_isolated"),
    [("qwen3_5", 4, False), ("qwen3_5_moe", 4, False)]
    + [(f, 4, True) for f in ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen3_omni_moe", "glm4v_moe")]
    + [(f, 3, False) for f in oracles.CLASSES],
)
def test_which_packed_calls_leak(family, num_axes, is_isolated):
    """Two rows in one: delta layers carry state over, and without positions of text (the fourth axis) all attend."""
    model = model_of(family)
    positions = torch.cat([torch.arange(9), torch.arange(14)]).expand(num_axes, 1, -1)
    ids = torch.randint(WORD, 97, (1, 23), generator=torch.Generator().manual_seed(5))
    other = ids.clone()
    other[0, 3] = WORD + 1 if ids[0, 3] != WORD + 1 else WORD
    packed, changed = (logits(model, input_ids=x, position_ids=positions.clone()) for x in (ids, other))
    alone = logits(model, input_ids=ids[:, 9:], attention_mask=torch.ones(1, 14, dtype=torch.int64))
    leak = (packed - changed)[:, 9:].abs().max().item()
    assert leak < 1e-11 if is_isolated else leak > 1e-3
    assert ((packed[:, 9:] - alone).abs().max() < 1e-11) == is_isolated


# ---- Qwen3.5


def test_a_model_of_delta_layers_alone_generates_only_without_its_cache():
    text = {"num_hidden_layers": 1, "layer_types": ["linear_attention"]}
    model = oracles.build(oracles.config(family="qwen3_5", text=text))
    inputs = one_row([WORD, WORD])
    settings = {"do_sample": False, "max_new_tokens": 2, "pad_token_id": oracles.PAD_ID}
    with pytest.raises(ValueError, match="can only be called on Attention layers"):
        model.generate(**inputs, **settings)
    assert model.generate(**inputs, **settings, use_cache=False).shape == (1, 4)


# ---- Qwen3-Omni


def test_a_clip_depends_on_the_longest_chunk_of_the_call():
    tower = model_of("qwen3_omni_moe").model.audio_tower
    g = torch.Generator().manual_seed(7)

    def encoded(*clips):
        with float64():
            lengths = torch.tensor([clip.shape[1] for clip in clips])
            return tower(torch.cat(clips, 1), feature_lens=lengths).last_hidden_state.detach()

    def clip(frames):
        return torch.randn(tower.num_mel_bins, frames, generator=g, dtype=torch.float64)

    short, whole = clip(57), clip(100)
    alone, together = encoded(short), encoded(short, whole)[: num_audio_tokens(57)]
    assert (alone - together).abs().max() > 1e-3
    assert (alone - together)[:-1].abs().max() > 1e-6  # attention spreads it over all tokens of the clip
    longer = clip(230)
    torch.testing.assert_close(encoded(longer), encoded(longer, short)[: num_audio_tokens(230)], rtol=1e-12, atol=1e-12)


def omni_positions(model, ids, *, seconds, frames, grids, sound):
    keys = {"video_grid_thw": torch.tensor(grids), "use_audio_in_video": sound}
    keys |= {"audio_seqlens": torch.tensor(frames), "second_per_grids": torch.tensor(seconds)}
    row = one_row(ids)
    return model.model.get_rope_index(row["input_ids"], attention_mask=row["attention_mask"], **keys)[0][:, 0]


def test_a_silent_video_beside_one_with_sound_has_positions_of_text():
    model = model_of("qwen3_omni_moe")
    kinds = interleave([0.0, 13.0], num_audio_tokens(100))
    heard = [START_ID, AUDIO_START_ID, *[VIDEO_ID if kind == VIDEO else AUDIO_ID for kind in kinds]]
    heard += [AUDIO_END_ID, END_ID]
    silent = [START_ID, *[VIDEO_ID] * 4, END_ID]
    ids = [WORD, *heard, WORD, *silent, WORD]
    positions = omni_positions(model, ids, seconds=[1.0, 1.0], frames=[100], grids=[[2, 2, 2], [1, 4, 4]], sound=True)
    place = slice(len(ids) - 6, len(ids) - 2)
    assert torch.equal(positions[0, place], positions[1, place])
    assert torch.equal(positions[0, place].diff(), torch.ones(3))
    alone = omni_positions(model, [WORD, *silent, WORD], seconds=[1.0], frames=[], grids=[[1, 4, 4]], sound=False)
    assert alone[:, 2:6].tolist() == [[2, 2, 2, 2], [2, 2, 3, 3], [2, 3, 2, 3]]


def order_of_the_processor(seconds, steps, num_sounds):
    """Kinds of the tokens of a video of one feature per step and its sound, from the library's own method."""
    names = {"video_token": "V", "audio_token": "A", "audio_bos_token": "", "audio_eos_token": ""}
    processor = SimpleNamespace(video_processor=SimpleNamespace(merge_size=2), **names)
    video = {"video_grid_thw": [(steps, 2, 2)], "video_second_per_grid": [seconds]}
    write = transformers.Qwen3OmniMoeProcessor.replace_video_with_audio_token
    text = write(processor, video, 0, {"num_audio_tokens": [num_sounds]}, 0, position_id_per_seconds=13.0)
    return [{"V": VIDEO, "A": AUDIO}[letter] for letter in text]


def test_videos_with_sound_are_written_here_as_by_the_processor():
    for seconds in (1.0, 0.5, 2.0, 0.25, 2 / 3, 2 / 30):
        for steps, num_sounds in ((1, 5), (7, 40), (40, 13)):
            ours = list(interleave([i * seconds * 13.0 for i in range(steps)], num_sounds))
            assert ours == order_of_the_processor(seconds, steps, num_sounds)


@pytest.mark.parametrize(("seconds", "is_swapped"), [(2 / 7, True), (0.5, False)])
def test_the_model_orders_a_video_and_its_sound_unlike_the_processor(seconds, is_swapped):
    """The processor compares times in float64, the model in float32 with the start added: tokens swap positions."""
    model, steps, frames = model_of("qwen3_omni_moe"), 23, 700
    kinds = order_of_the_processor(seconds, steps, num_audio_tokens(frames))
    ids = [START_ID, AUDIO_START_ID, *[VIDEO_ID if kind == VIDEO else AUDIO_ID for kind in kinds], AUDIO_END_ID, END_ID]
    row = [WORD, *ids, WORD]
    positions = omni_positions(model, row, seconds=[seconds], frames=[frames], grids=[[steps, 2, 2]], sound=True)
    sounds = positions[:, 3 : 3 + len(kinds)][:, torch.tensor(kinds) == AUDIO]
    want = (torch.arange(sounds.shape[1]) + 3.0).expand(3, -1)
    assert (not torch.equal(sounds, want)) == is_swapped
    assert (sounds != want).any(0).sum() == is_swapped  # one token of sound has the place of a feature


def test_seconds_per_step_are_those_of_one_frame_per_second():
    """Where no rate is passed; the frames are sampled at the rate of the processor of videos all the same."""

    class Sampler:
        fps, temporal_patch_size = 2.0, 2

        def __call__(self, videos, **kwargs):
            return {"video_grid_thw": [(4, 2, 2)]}

    processor = SimpleNamespace(video_processor=Sampler(), replace_video_token=lambda *args, **kwargs: "")
    process = transformers.Qwen3OmniMoeProcessor._process_videos
    for rate, seconds in ((None, 2.0), (2.0, 1.0)):
        videos, _ = process(processor, [], videos_kwargs={} if rate is None else {"fps": rate})
        assert (processor.video_processor.fps, videos["video_second_per_grid"]) == (2.0, [seconds])


# ---- GLM-4.5V


def test_images_and_videos_in_one_call_are_refused():
    model = model_of("glm4v_moe")
    inputs = oracles.inputs(model.config, 3, rows=3)
    assert {"pixel_values", "pixel_values_videos"} <= inputs.keys()
    with pytest.raises(ValueError, match="do not match"):
        logits(model, **inputs)


def test_frames_may_be_given_as_images():
    """What stands in for the refused call gives the logits of calls with images alone and with videos alone."""
    model, kinds_seen = model_of("glm4v_moe"), set()
    for seed in range(8):
        whole = oracles.inputs(model.config, seed, rows=4, images=1, videos=1)
        if not {"pixel_values", "pixel_values_videos"} <= whole.keys():
            continue
        mask = whole["attention_mask"].bool()
        stand_in = frames_as_images({k: v.double() if v.is_floating_point() else v for k, v in whole.items()})
        per_row = logits(model, **stand_in)[mask].split(mask.sum(1).tolist())
        for row, got in zip(oracles.rows_of(whole), per_row, strict=True):
            media = {key for key in row if key.startswith("pixel")}
            if len(media) == 1:
                row = {k: v.double() if v.is_floating_point() else v for k, v in row.items()}
                torch.testing.assert_close(got, logits(model, **row)[0], rtol=1e-12, atol=1e-12)
                kinds_seen |= media
    assert kinds_seen == {"pixel_values", "pixel_values_videos"}


def test_the_tower_takes_a_video_as_frames_alone():
    tower = model_of("glm4v_moe").model.visual
    width = 3 * 2 * tower.config.patch_size**2
    pixels = torch.randn(8, width, dtype=torch.float64)
    with float64(), pytest.raises(IndexError):
        tower(pixels, grid_thw=torch.tensor([[2, 2, 2]]))
    with float64():
        frames = tower(pixels, grid_thw=torch.tensor([[1, 2, 2], [1, 2, 2]])).pooler_output
    assert len(frames) == 2


# ---- experts


@pytest.mark.parametrize("family", [f for f in oracles.CLASSES if "moe" in f])
def test_the_balance_of_routers_is_of_softmax_over_all_layers(family):
    """Also that of GLM-4.5V, whose router takes sigmoids; not divided by the number of chosen experts."""
    model = model_of(family, text={**oracles.RECIPES[family].mixed, "output_router_logits": True})
    inputs = oracles.inputs(model.config, 3, rows=3)
    out = oracles.run(model, inputs)
    mask = inputs["attention_mask"].flatten().bool()
    probs = torch.stack([layer.softmax(-1)[mask] for layer in out.router_logits]).flatten(0, 1).detach()
    num_experts, experts = probs.shape[1], probs.topk(model.config.text_config.num_experts_per_tok)[1]
    counts = torch.nn.functional.one_hot(experts, num_experts).sum(1).double()
    want = num_experts * (counts.mean(0) * probs.mean(0)).sum()
    torch.testing.assert_close(out.aux_loss.detach(), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("width", [22, 18])
def test_square_experts_load_untransposed(width, tmp_path):
    """The hub stores [experts, in, out]; the library tells the layout by shapes, which are alike where 2 I equals D."""
    cfg = oracles.config(family="qwen3_vl_moe", text={"moe_intermediate_size": width})
    model = oracles.build(cfg)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    hub = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in load_file(path).items()}
    save_file(hub, path, metadata={"format": "pt"})
    back, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    is_square = 2 * width == cfg.text_config.hidden_size
    assert torch.equal(back.get_parameter(name), model.get_parameter(name)) != is_square
