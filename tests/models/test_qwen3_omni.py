"""What is peculiar to Qwen3-Omni's thinker: the audio tower, positions of sound, of videos and of both, its files."""

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmfn
from mmfn import ops as op_tables
from mmfn import tree
from mmfn.batch import AUDIO, IGNORE, IMAGE, TEXT, VIDEO, Media, Sample
from mmfn.models import family
from mmfn.models.layers import audio
from mmfn.parallel.context.tower_split import split_tower
from mmfn.parallel.mesh.axis import Axis
from mmfn.train.evidence.float64 import float64
from tests import oracles
from tests.batches import wide
from tests.oracles.conversations import interleave, num_audio_tokens
from tests.tiny import model_of

STARTS = {IMAGE: (3,), VIDEO: (3,), AUDIO: (6,)}  # marks in front of a medium, and those behind
ENDS = {IMAGE: (4,), VIDEO: (4,), AUDIO: (7,)}
PLACES = {IMAGE: 1, VIDEO: 2, AUDIO: 5}
SECONDS = (1.0, 0.5, 2.0, 1 / 3, 2 / 24)


@pytest.fixture(scope="module")
def oracle():
    return oracles.build(oracles.config(family="qwen3_omni_moe"), 0, torch.float64)


@pytest.fixture(scope="module")
def model(oracle, tmp_path_factory):
    return mmfn.load_hf(oracles.save(oracle, tmp_path_factory.mktemp("model")))


def clip(num_frames, cfg, seed=0):
    g = torch.Generator().manual_seed(seed)
    return audio.clip_of(torch.randn(num_frames, cfg.num_mels, generator=g))


def heard(*lengths, cfg):
    """A sample of clips of so many frames, one behind the other, between words."""
    clips = [clip(n, cfg.audio, i) for i, n in enumerate(lengths)]
    kinds = [TEXT]
    for n in lengths:
        kinds += [AUDIO] * audio.num_rows(n) + [TEXT]
    tokens_T = torch.tensor([PLACES.get(kind, 20) for kind in kinds])
    labels_T = torch.full_like(tokens_T, IGNORE)
    return Sample(tokens_T=tokens_T, labels_T=labels_T, kinds_T=torch.tensor(kinds), audios=tuple(clips))


def test_a_clip_has_as_many_tokens_as_in_transformers():
    assert all(audio.num_rows(n) == num_audio_tokens(n) for n in range(1, 1301))
    assert audio.num_rows(audio.CHUNK) == audio.ROWS


@pytest.mark.parametrize("lengths", [(130, 57), (100,), (1000, 3, 99, 101, 57), (1, 400), (230, 200, 8, 9)])
def test_the_tower_equals_transformers(oracle, model, lengths):
    """Clips of any length, where the library's call has a whole chunk, to which it fills up all."""
    sample = heard(*lengths, cfg=model.cfg)
    frames = [c.inputs_UF[: c.grid[0]].T.double() for c in sample.audios]
    tower = wide(model.family.pack([sample], model.cfg)).towers["audio"]
    with float64():
        want_ND = oracle.model.audio_tower(torch.cat(frames, 1), feature_lens=torch.tensor(lengths)).last_hidden_state
        rows_PD = audio.encode(model.params["audio"], tower, model.cfg.audio, op_tables.portable())
    got_ND = rows_PD[tower.index_T[tower.index_T >= 0]]
    torch.testing.assert_close(got_ND, want_ND, rtol=0, atol=1e-12)


def test_pieces_of_the_convolutions_change_nothing(model, monkeypatch):
    tower = wide(model.family.pack([heard(1000, 57, 230, cfg=model.cfg)], model.cfg)).towers["audio"]

    def encoded(params):
        return audio.encode(params, tower, model.cfg.audio, op_tables.portable())

    def run(params):
        return encoded(params).square().sum()

    want, grads = mmfn.value_and_grad(run)(model.params["audio"])
    monkeypatch.setattr(audio, "PIECE", 4)
    got, split = mmfn.value_and_grad(run)(model.params["audio"])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for mine, theirs in zip(tree.leaves(split), tree.leaves(grads), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10 * max(1e-3, theirs.abs().max().item()))


def test_rows_that_stand_for_nothing_reach_no_token(model):
    """Of a tail, what is behind its frames; and a clip's windows do not see each other, nor another clip."""
    sample = heard(230, 57, cfg=model.cfg)
    batch = wide(model.family.pack([sample], model.cfg))
    laid = model.family.lay(sample, model.cfg)["audio"]
    assert laid.segments == ((26, 4, 9, 8, 5),)
    assert laid.items == (2, 1, 1)
    frames_UF = batch.towers["audio"].inputs_UF.requires_grad_()
    rows_PD = audio.encode(model.params["audio"], batch.towers["audio"], model.cfg.audio, op_tables.portable())
    for first, last, chunks in ((0, 26, {0, 1}), (26, 30, {2}), (39, 47, {3})):
        (grad_UF,) = torch.autograd.grad(rows_PD[first:last].square().sum(), frames_UF, retain_graph=True)
        touched = grad_UF.abs().sum(1).view(-1, audio.CHUNK).sum(1).nonzero()[:, 0]
        assert set(touched.tolist()) == chunks


def test_a_long_clip_is_spread_over_ranks(model):
    """Windows are items: what four ranks encode, each its share, are the features of one device."""
    sample = heard(2130, 57, 300, 801, 3, cfg=model.cfg)
    tower = wide(model.family.pack([sample], model.cfg)).towers["audio"]
    kind, encode = model.family.towers(model.cfg)["audio"], audio.encode
    whole_PD = encode(model.params["audio"], tower, model.cfg.audio, op_tables.portable())
    want_ND = whole_PD[tower.index_T[tower.index_T >= 0]]
    shares = [split_tower(tower, kind, Axis(name="cp", size=4, index=i)) for i in range(4)]
    loads = [int(own.items_I.sum()) for own, _ in shares]
    assert max(loads) - min(loads) <= model.cfg.audio.window
    rows_MD = torch.cat([encode(model.params["audio"], x, model.cfg.audio, op_tables.portable()) for x, _ in shares])
    places = shares[0][1][tower.index_T + 1]
    torch.testing.assert_close(rows_MD[places[places >= 0]], want_ND, rtol=0, atol=1e-12)


# ---- positions


def conversation(seed, cfg, *, with_sound):
    """A sample with media in any order between words, and what `get_rope_index` is given for it."""
    r = random.Random(seed)
    ids, kinds, images, videos, clips = [], [], [], [], []

    def write(*parts):
        for kind, count in parts:
            ids.extend([PLACES.get(kind, 20)] * count)
            kinds.extend([kind] * count)

    def enclose(kind, count):
        ids.extend(STARTS[kind])
        kinds.append(TEXT)
        write((kind, count))
        ids.extend(ENDS[kind])
        kinds.append(TEXT)

    def sound():
        clips.append(r.randint(1, 400))
        return num_audio_tokens(clips[-1])

    write((TEXT, r.randint(1, 4)))
    for _ in range(r.randint(1, 4)):
        what, h, w = r.choice([IMAGE, VIDEO, AUDIO]), r.randint(1, 5), r.randint(1, 20)
        if what == IMAGE:
            images.append((1, 2 * h, 2 * w))
            enclose(IMAGE, h * w)
        elif what == AUDIO:
            enclose(AUDIO, sound())
        else:
            t, seconds = r.randint(1, 4), r.choice(SECONDS)
            videos.append(((t, 2 * h, 2 * w), seconds))
            if not with_sound:
                enclose(VIDEO, t * h * w)
            else:
                ids.extend((*STARTS[VIDEO], *STARTS[AUDIO]))
                kinds.extend((TEXT, TEXT))
                times = [i * seconds * cfg.positions_per_second for i in range(t) for _ in range(h * w)]
                write(*((kind, 1) for kind in interleave(times, sound())))
                ids.extend((*ENDS[AUDIO], *ENDS[VIDEO]))
                kinds.extend((TEXT, TEXT))
        write((TEXT, r.randint(0, 3)))
    tokens_T, values = torch.tensor(ids), cfg.vision.patch_values
    sample = Sample(
        tokens_T=tokens_T,
        labels_T=torch.full_like(tokens_T, IGNORE),
        kinds_T=torch.tensor(kinds),
        images=tuple(Media(inputs_UF=torch.empty(g[1] * g[2], values), grid=g) for g in images),
        videos=tuple(
            Media(inputs_UF=torch.empty(g[0] * g[1] * g[2], values), grid=g, seconds_per_grid=s) for g, s in videos
        ),
        audios=tuple(clip(n, cfg.audio) for n in clips),
    )
    grids = {"image_grid_thw": images, "video_grid_thw": [g for g, _ in videos]}
    given = {key: torch.tensor(value) if value else None for key, value in grids.items()}
    given |= {"audio_seqlens": torch.tensor(clips), "second_per_grids": torch.tensor([s for _, s in videos])}
    return sample, given | {"use_audio_in_video": with_sound}


@pytest.mark.parametrize("with_sound", [False, True])
def test_positions_are_those_of_transformers_to_the_last_bit(with_sound):
    """Fractions of positions too; where a video and its sound are one block, its last token ends it."""
    oracle = oracles.build(oracles.config(family="qwen3_omni_moe"))
    cfg = family("qwen3_omni_moe").config_from_hf(oracles.to_dict(oracle.config))
    checked, fractions = 0, 0
    for seed in range(150):
        sample, given = conversation(seed, cfg, with_sound=with_sound)
        if not (sample.images or sample.videos):
            continue  # the library then counts tokens
        row = sample.tokens_T[None]
        want, _ = oracle.model.get_rope_index(row, attention_mask=torch.ones_like(row), **given)
        got_3T = family("qwen3_omni_moe").positions(sample, cfg)
        assert torch.equal(got_3T, want[:, 0])
        assert got_3T.dtype == torch.float32
        checked, fractions = checked + 1, fractions + bool((got_3T % 1 != 0).any())
    assert checked > 100
    assert fractions > 20


def test_a_silent_video_beside_one_that_is_heard_is_a_video(model):
    """Which the library takes for text: see `test_library_faults`."""
    videos = [
        Media(inputs_UF=torch.empty(8, 0), grid=(2, 2, 2), seconds_per_grid=1.0),
        Media(inputs_UF=torch.empty(16, 0), grid=(1, 4, 4), seconds_per_grid=1.0),
    ]
    kinds = [TEXT, *interleave([0.0, 13.0], 13), TEXT, *[VIDEO] * 4, TEXT]
    tokens_T = torch.zeros(len(kinds), dtype=torch.int64)
    sample = Sample(tokens_T=tokens_T, labels_T=tokens_T, kinds_T=torch.tensor(kinds), videos=tuple(videos))
    sample = replace(sample, audios=(clip(100, model.cfg.audio),))
    positions_3T = model.family.positions(sample, model.cfg)
    assert positions_3T[:, 1:3].tolist() == [[1, 1], [1, 1], [1, 1]]  # the first step and its first sound
    assert positions_3T[0, -6:].tolist() == [15, 16, 16, 16, 16, 18]
    assert positions_3T[1:, -5:-1].tolist() == [[16, 16, 17, 17], [16, 17, 16, 17]]
    with pytest.raises(ValueError, match=r"a run of placeholder tokens with 12 left where the next .* clip gives 13"):
        model.family.positions(replace(sample, kinds_T=sample.kinds_T[torch.arange(len(kinds)) != 5]), model.cfg)


def test_media_that_do_not_fit_are_refused(model):
    sample = heard(130, cfg=model.cfg)
    with pytest.raises(ValueError, match="has 17 audio placeholder tokens but its 0 clips give 0 features"):
        model.family.lay(replace(sample, audios=()), model.cfg)
    short = replace(sample.audios[0], grid=(90, 1, 1))
    with pytest.raises(ValueError, match=r"a clip of 90 frames and inputs of shape \[200, 11\], not \[100, 11\]"):
        model.family.lay(replace(sample, audios=(short,)), model.cfg)


# ---- files


def test_a_whole_model_and_its_thinker_load_alike(oracle, model, tmp_path):
    """Names with and without the prefix, under either config; the thinker's own config is what transformers saves."""
    prefixed = {f"thinker.{n}": t for n, t in mmfn.to_hf(model.params, replace(model, cfg=bare(model.cfg))).items()}
    named = mmfn.to_hf(model.params, model)
    assert named.keys() == prefixed.keys()
    assert "thinker.model.layers.0.mlp.experts.5.gate_proj.weight" in named
    oracle.save_pretrained(tmp_path / "alone")
    alone = mmfn.load_hf(tmp_path / "alone")
    assert (alone.family.name, alone.cfg.prefix, model.cfg.prefix) == ("qwen3_omni_moe", "", "thinker.")
    for own in (model, alone):
        for layout in ("hub", "transformers", "renamed"):
            mmfn.save_hf(tmp_path / "out", own, layout=layout, overwrite=True)
            again = mmfn.load_hf(tmp_path / "out")
            assert all(
                torch.equal(a, b) for a, b in zip(tree.leaves(again.params), tree.leaves(model.params), strict=True)
            )


def bare(cfg):
    return replace(cfg, prefix="")


@pytest.mark.parametrize("layout", ["hub", "transformers", "renamed"])
def test_transformers_loads_every_layout(model, oracle, layout, tmp_path):
    """The class of the thinker, from a checkpoint of a thinker alone or of the whole model."""
    config = oracle.config.to_dict()
    own = replace(model, cfg=bare(model.cfg), hf_config=config)
    mmfn.save_hf(tmp_path / "out", own, layout=layout)
    loaded, info = oracles.oracle_class(oracle.config).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    for name, value in oracle.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_what_speaks_is_passed_on_byte_for_byte(model, oracle, tmp_path):
    """The talker's and the codec's tensors, the whole config, and an index that covers all."""
    folder = oracles.save(oracle, tmp_path / "source", max_shard_size="40KB")
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    spoken = {
        "talker.model.layers.0.mlp.experts.0.gate_proj.weight": torch.randn(3, 5).bfloat16(),
        "talker.code_predictor.lm_head.3.weight": torch.randn(7, 2),
        "code2wav.decoder.1.block.0.alpha": torch.randn(9).half(),
    }
    save_file(spoken, folder / "speech.safetensors")
    index["weight_map"] |= dict.fromkeys(spoken, "speech.safetensors")
    index_file.write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config |= {"talker_config": {"text_config": {"num_experts": 2}}, "code2wav_config": {"x": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    mmfn.save_hf(tmp_path / "out", mmfn.load_hf(folder), assets=folder)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (saved["talker_config"]["text_config"]["num_experts"], saved["code2wav_config"]["x"]) == (2, 1)
    tensors = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    for name, value in spoken.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


# ---- configs


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("audio_config", "n_window", 40, "audio_config.n_window is 40 but must be 50"),
        ("audio_config", "n_window_infer", 60, "n_window_infer is 60 but must be an integer of at least 100"),
        ("audio_config", "activation_function", "relu", "activation_function is 'relu'"),
        ("audio_config", "output_dim", 21, "audio_config.output_dim is 21 but must equal text_config.hidden_size 20"),
        ("audio_config", "d_model", 9, "audio_config.d_model is 9 but must be an even multiple"),
        ("audio_config", "dropout", 0.1, "audio_config.dropout is 0.1"),
        ("text_config", "num_experts_per_tok", 9, "num_experts_per_tok is 9 of 8 experts"),
    ],
)
def test_settings_that_are_refused(section, key, value, message):
    hf = json.loads(json.dumps(model_of("omni").hf_config))
    hf["thinker_config"][section][key] = value
    with pytest.raises(ValueError, match=message):
        mmfn.init(hf)


def test_defaults_are_those_of_transformers():
    import transformers

    config = transformers.Qwen3OmniMoeThinkerConfig()
    config.text_config.head_dim = 128  # which the class leaves at an odd 73
    config.vision_config.out_hidden_size = config.audio_config.output_dim = config.text_config.hidden_size
    cfg = family("qwen3_omni_moe_thinker").config_from_hf(config.to_dict())
    least = {"text_config": {"head_dim": 128}, "vision_config": {"out_hidden_size": 2048}}
    least |= {"audio_config": {"output_dim": 2048}, "model_type": "qwen3_omni_moe_thinker"}
    assert family("qwen3_omni_moe_thinker").config_from_hf(least) == cfg
    whole = {"model_type": "qwen3_omni_moe", "thinker_config": least}
    assert family("qwen3_omni_moe").config_from_hf(whole) == replace(cfg, prefix="thinker.")
