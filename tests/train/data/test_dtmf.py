"""The example of sound: its clips, its samples, and its model folder."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
import transformers

import mmfn
from mmfn.train.build.processor import load_model_processor
from mmfn.train.data import Dataset, decode_audio
from mmfn.train.forward import Forward
from mmfn.train.run.answer import AnswerSettings, answer_prompts, encode_prompt

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def module() -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("dtmf_example", EXAMPLES / "dtmf.py")
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    finally:
        sys.path.remove(str(EXAMPLES))
    found.NUM = {"train": 6, "eval": 3}
    return found


@pytest.fixture(scope="module")
def folder(module, tmp_path_factory):
    out = tmp_path_factory.mktemp("dtmf")
    module.write_demo(out)
    return out


def test_clips_hold_the_tones_of_their_keys(module, folder):
    """In each half the two strongest frequencies are those of the key."""
    for entry in json.loads((folder / "eval.json").read_text()):
        wave_S = decode_audio(folder / entry["audios"][0], 16_000)
        assert wave_S.numel() == 16_000
        for half, key in zip(wave_S.view(2, 8000), entry["messages"][1]["content"], strict=True):
            place = module.KEYS.index(key)
            powers = np.abs(np.fft.rfft(half.numpy()))
            for tones, tone in ((module.LOW_HZ, place // 4), (module.HIGH_HZ, place % 4)):
                assert max(range(4), key=lambda i: powers[tones[i] // 2 - 2 : tones[i] // 2 + 3].max()) == tone


def test_samples(folder):
    data = Dataset(folder / "train.json", load_model_processor(folder / "model"))
    sample = data.sample(2)
    answer = data.records[2].messages[1]["content"]
    pads = "<|audio_pad|>" * 13
    assert data.processor.chat.tokenizer.decode(sample.tokens_T) == (
        f"<|im_start|>user\n<|audio_start|>{pads}<|audio_end|>Which keys?<|im_end|>\n"
        f"<|im_start|>assistant\n{answer}<|im_end|>\n"
    )
    assert sample.audios[0].grid == (100, 1, 1)
    prompt, truth = data.prompt(2)
    assert truth == answer
    assert torch.equal(prompt.audios[0].inputs_UF, sample.audios[0].inputs_UF)


def test_a_clip_in_another_file_is_the_same_sample(folder, tmp_path):
    """Of two equal channels without loss to the last bit; at another rate and with loss nearly."""
    entry = json.loads((folder / "train.json").read_text())[2]
    samples, rate = soundfile.read(folder / entry["audios"][0], dtype="float32")
    processor = load_model_processor(folder / "model")
    soundfile.write(tmp_path / "a.flac", np.stack([samples, samples], 1), rate)
    soundfile.write(tmp_path / "b.ogg", soxr.resample(samples, rate, 44_100), 44_100)
    entries = [{**entry, "audios": [name]} for name in ("a.flac", "b.ogg")]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    data = Dataset(tmp_path / "data.json", processor)
    first, second = data.sample(0), data.sample(1)
    expected = Dataset(folder / "train.json", processor).sample(2)
    assert torch.equal(first.audios[0].inputs_UF, expected.audios[0].inputs_UF)
    assert torch.equal(second.tokens_T, expected.tokens_T)
    loud = expected.audios[0].inputs_UF > expected.audios[0].inputs_UF.max() - 0.5  # the upper 20 dB
    assert (second.audios[0].inputs_UF - expected.audios[0].inputs_UF)[loud].abs().max() < 0.1


def test_the_model_folder_loads_in_transformers(folder):
    config = transformers.Qwen3OmniMoeThinkerConfig.from_pretrained(folder / "model")
    with torch.device("meta"):
        model = transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config)
    assert 650_000 < sum(p.numel() for p in model.parameters()) < 750_000
    extract = transformers.WhisperFeatureExtractor.from_pretrained(folder / "model")
    assert (extract.feature_size, extract.sampling_rate) == (128, 16_000)


def test_a_question_about_a_file(folder):
    """As `mmfn generate --audio` asks it; the mark stands in front of the question where it has none."""
    forward = Forward.of(mmfn.init(json.loads((folder / "model" / "config.json").read_text())))
    processor, clip = load_model_processor(folder / "model"), str(folder / "clips" / "eval-0001.wav")
    prompts = [encode_prompt(processor, text, audios=[clip]) for text in ("Which?", "<audio>Which?")]
    prompts.append(encode_prompt(processor, "Which?"))
    settings = AnswerSettings(max_new_tokens=3, eos_token_ids=())
    answers = answer_prompts(forward, processor.chat.tokenizer, prompts, settings)
    assert answers[0] == answers[1] != answers[2]
    with pytest.raises(ValueError, match="it has 2 audio placeholders for 1 audios"):
        encode_prompt(processor, "<audio><audio>Which?", audios=[clip])


def test_running_it_again_writes_the_same_bytes(module, folder, tmp_path):
    module.write_demo(tmp_path)
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
