"""Videos whose sound is heard along with them, against `Qwen3OmniMoeProcessor` with `load_audio_from_video`."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import mmfn
from mmfn.batch import AUDIO, VIDEO
from mmfn.train.build.processor import load_model_processor
from mmfn.train.build.run import prepare
from mmfn.train.config.load import load_config
from mmfn.train.data import Dataset, decode_audio
from mmfn.train.data.video import decode_video
from mmfn.train.run.progress import Progress
from mmfn.train.run.training import run_training
from tests.oracles.torchvision import in_place_of_torchvision, library_class
from tests.train.data.clips import write_clip

pytest.importorskip("av", reason="PyAV is an optional dependency")
EXAMPLES = Path(__file__).parents[3] / "examples"
RATE = 16_000
TEMPLATE = (
    "{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\n' -}}{%- if m.role == 'assistant' -%}"
    "{%- generation -%}{{- m.content ~ '<|im_end|>\n' -}}{%- endgeneration -%}{%- else -%}{%- for p in m.content -%}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' if p.type == 'video' else '<|vision_start|><|image_pad|>"
    "<|vision_end|>' if p.type == 'image' else '<|audio_start|><|audio_pad|><|audio_end|>' if p.type == 'audio' else "
    "p.text -}}{%- endfor -%}{{- '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{{- '<|im_start|>assistant\n' if add_generation_prompt else '' -}}"
)
CLIPS = [  # container, codecs of pictures and sound, frames, rate, seconds of sound, its rate, channels
    ("mp4", "libx264", "aac", 40, 10, 4.0, 44_100, 2),
    ("mkv", "libx264", "pcm_s16le", 33, 20, 1.3, 48_000, 1),
    ("webm", "libvpx-vp9", "libopus", 51, 25, 2.5, 48_000, 2),
    ("mov", "mjpeg", "pcm_s16le", 24, 8, 3.37, 22_050, 1),
    ("avi", "mpeg4", "pcm_s16le", 60, 30, 0.4, 16_000, 2),
    ("mp4", "libx264", "aac", 90, 15, 9.0, 16_000, 1),
]


def clip(folder, place):
    suffix, codec, sound_codec, num, rate, seconds, sound_rate, channels = CLIPS[place]
    sound_SC = 0.2 * np.random.default_rng(place).standard_normal((int(seconds * sound_rate), channels))
    return write_clip(
        folder / f"{place}.{suffix}",
        codec=codec,
        num=num,
        rate=rate,
        sound_SC=sound_SC,
        sound_rate=sound_rate,
        sound_codec=sound_codec,
    )


def write_model(out):
    """A model that hears and sees, into a new folder."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import dtmf

        dtmf.write_model(out)
        dtmf.make_tokenizer((*dtmf.SPECIAL, *dtmf.SOUND), TEMPLATE).save_pretrained(out)
    finally:
        sys.path.remove(str(EXAMPLES))
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("omni") / "model")


@pytest.fixture(scope="module")
def processor(model):
    return load_model_processor(str(model))


def library(model, own):
    names = ("image", "audio", "video")
    tokens = {f"{name}_token": f"<|{name}_pad|>" for name in names}
    tokens |= {
        f"{kind}_{end}_token": f"<|{kind}_{mark}|>"
        for kind in ("vision", "audio")
        for end, mark in (("bos", "start"), ("eos", "end"))
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, extra_special_tokens=tokens)
    pixels = own.video_spec.pixels.to_hf()
    unchecked = {"check_argument_for_proper_class": lambda self, name, argument: type(argument)}
    return type("Qwen3OmniMoeProcessor", (transformers.Qwen3OmniMoeProcessor,), unchecked)(
        image_processor=library_class("qwen2_vl.image_processing_qwen2_vl.Qwen2VLImageProcessor")(**pixels),
        video_processor=library_class("qwen2_vl.video_processing_qwen2_vl.Qwen2VLVideoProcessor")(**pixels),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=128),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )


def entry(*parts, **more):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "yes"}], **more}


def write(folder, *entries):
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return path


def positions_of(model, inputs):
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(model)
        thinker = transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config)
    heard = inputs["feature_attention_mask"].sum(1)
    keys = {"video_grid_thw": inputs["video_grid_thw"], "second_per_grids": inputs["video_second_per_grid"]}
    mask = torch.ones_like(inputs["input_ids"])
    places, _ = thinker.get_rope_index(
        inputs["input_ids"], attention_mask=mask, use_audio_in_video=True, audio_seqlens=heard, **keys
    )
    return places[:, 0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in the library
@pytest.mark.parametrize("place", range(len(CLIPS)))
def test_text_positions_and_features_are_those_of_the_library(tmp_path, model, processor, place):
    path = clip(tmp_path, place)
    data = write(tmp_path, entry({"type": "video", "video": path.name}, {"type": "text", "text": "what?"}))
    sample = Dataset(data, processor, is_heard=True).sample(0)
    footage = decode_video(path, processor.media.sampling())
    wave = decode_audio(path, RATE).numpy()
    with in_place_of_torchvision():
        theirs = library(model, processor.media)
        text = theirs.apply_chat_template(entry({"type": "video"}, {"type": "text", "text": "what?"})["messages"])
        inputs = theirs(
            text=text,
            videos=[footage.frames_u8],
            audio=[wave],
            load_audio_from_video=True,
            audio_from_video_indices=[0],
            videos_kwargs={"size": processor.media.video_spec.pixels.to_hf()["size"], "do_sample_frames": False}
            | {"fps": footage.rate},
            return_tensors="pt",
        )
    assert sample.tokens_T.tolist() == inputs["input_ids"][0].tolist()
    assert torch.equal(sample.videos[0].in_floats().inputs_UF, inputs["pixel_values_videos"])
    (sound,) = sample.audios
    assert torch.equal(sound.inputs_UF[: sound.grid[0]], inputs["input_features"][0].T)
    assert sample.videos[0].sound is sound
    kinds, _ = torch.unique_consecutive(sample.kinds_T, return_counts=True)
    assert kinds.tolist().count(AUDIO) >= 1
    assert kinds.tolist().count(VIDEO) >= 1
    family = mmfn.models.family("qwen3_omni_moe")
    cfg = family.config_from_hf(json.loads((model / "config.json").read_text()))
    assert torch.equal(family.positions(sample, cfg), positions_of(model, inputs).float())


def test_sounds_stand_in_the_order_of_their_tokens(tmp_path, processor):
    """A clip, a video that is heard, a video that is not, another clip; and a prompt that ends before the last."""
    import soundfile

    videos = [clip(tmp_path, place) for place in (1, 3)]
    for place in range(2):
        soundfile.write(tmp_path / f"{place}.wav", np.full(4000 * (place + 1), 0.1), RATE)
    parts = [
        {"type": "audio", "audio": "0.wav"},
        {"type": "video", "video": videos[0].name},
        {"type": "video", "video": videos[1].name, "use_audio_in_video": False},
    ]
    turns = entry(*parts)["messages"] + entry({"type": "audio", "audio": "1.wav"})["messages"]
    data = Dataset(write(tmp_path, {"messages": turns}, {"messages": turns[:2]}), processor, is_heard=True)
    sample = data.sample(0)
    assert [one.grid[0] for one in sample.audios] == [25, sample.videos[0].sound.grid[0], 50]
    assert sample.videos[1].sound is None
    whole, _ = data.prompt(0)
    assert len(whole.audios) == 3
    first, answer = data.prompt(1)
    assert (len(first.audios), len(first.videos), answer) == (2, 2, "yes")
    assert torch.equal(first.tokens_T, data.sample(1).tokens_T[: first.tokens_T.numel()])
    measured = data.reader.measure(data.records[0], tmp_path.joinpath)
    assert [(m.grid, m.sound and m.sound.grid) for m in measured["video"]] == [
        (m.grid, m.sound and m.sound.grid) for m in sample.videos
    ]


def test_a_piece_of_a_video_is_heard_alone(tmp_path, processor):
    path = clip(tmp_path, 0)
    part = {"type": "video", "video": path.name, "video_start": 1.0, "video_end": 2.5}
    sample = Dataset(write(tmp_path, entry(part)), processor, is_heard=True).sample(0)
    assert sample.audios[0].grid[0] == 150
    wave_S = decode_audio(path, RATE)[RATE : RATE * 5 // 2]
    assert torch.equal(sample.audios[0].inputs_UF, processor.media.audio(wave_S).inputs_UF)


def test_what_cannot_be_heard_is_one_sentence(tmp_path, processor, digits):
    write_clip(tmp_path / "silent.mp4", num=20, rate=10)
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    frames = {"type": "video", "video": ["0.png", "1.png"]}
    silent = {"type": "video", "video": "silent.mp4"}
    data = Dataset(write(tmp_path, entry(silent), entry(frames)), processor, is_heard=True)
    for place, reason in ((0, r"silent\.mp4.*it has no sound"), (1, "a list of frames has no sound")):
        with pytest.raises(
            ValueError, match=rf"use_audio_in_video is on, but .*{reason}.*set it to false for this video"
        ):
            data.sample(place)
    off = write(tmp_path, entry({**silent, "use_audio_in_video": False}))
    assert Dataset(off, processor, is_heard=True).sample(0).audios == ()
    deaf = load_model_processor(str(digits / "model"))
    with pytest.raises(ValueError, match=r"data\.use_audio_in_video is True, but the model takes no sound; remove"):
        Dataset(off, deaf, is_heard=True)


def test_sound_passes_through_another_rate(tmp_path, processor):
    """As MindSpeed-MM loads it: at `audio_sampling_rate`, then at the model's."""
    import soundfile

    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(44_100), 44_100)
    part = {"type": "audio", "audio": "a.wav"}
    data = Dataset(write(tmp_path, entry(part)), processor, audio_rate=8000)
    want = torch.from_numpy(
        __import__("soxr").resample(decode_audio(tmp_path / "a.wav", 8000).numpy(), 8000, RATE, quality="HQ")
    )
    assert torch.equal(data.sample(0).audios[0].inputs_UF, processor.media.audio(want).inputs_UF)
    with pytest.raises(ValueError, match="a part of type video must be true or false, got 1; correct it"):
        Dataset(write(tmp_path, entry({"type": "video", "video": "a.mp4", "use_audio_in_video": 1})), processor).sample(
            0
        )


def test_a_run_hears_trains_answers_and_exports_its_bounds(tmp_path, model):
    """From the config to the exported checkpoint, which prepares videos as they were in training."""
    names = [clip(tmp_path, place).name for place in (0, 1, 3, 5)]
    data = write(
        tmp_path, *(entry({"type": "video", "video": name}, {"type": "text", "text": "what?"}) for name in names)
    )
    settings = {
        "model": {"path": str(model), "init": "random"},
        "data": {
            "train": str(data),
            "eval": str(data),
            "batch_samples": 2,
            "token_buckets": [2048],
            "tower_buckets": {"vision": [2048], "audio": [3200]},
            "use_audio_in_video": True,
            "video_fps": 1.0,
            "video_maxlen": 6,
            "video_max_pixels": 600,
        },
        "optimizer": {"lr": 1e-3},
        "schedule": {"kind": "constant"},
        "train": {"steps": 2},
        "eval": {"max_new_tokens": 2},
        "output": {"path": str(tmp_path / "run")},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    said: list[str] = []
    run_training(prepare(load_config(path), said.append), Progress(num_steps=2, log_every=1, stream=io.StringIO()))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert len(json.loads((tmp_path / "run" / "eval.json").read_text())["answers"]) == 4
    exported = load_model_processor(str(tmp_path / "run" / "checkpoint"))
    assert (exported.media.video_spec.fps, exported.media.video_spec.max_frames) == (1.0, 6)
    assert exported.media.video_spec.pixels.max_pixels == 600
    again = Dataset(data, exported, is_heard=True).sample(0)
    settled = load_model_processor(str(model), settings=load_config(path).config.data.media_settings)
    assert torch.equal(again.tokens_T, Dataset(data, settled, is_heard=True).sample(0).tokens_T)
