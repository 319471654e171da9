import json
import wave

import numpy as np
import pytest
import torch

from mmfn.train.data import Dataset, decode_audio


def write(path, samples, channels=1, width=2, rate=16_000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


def test_samples_are_parts_of_the_largest(tmp_path):
    samples = np.array([-(2**15), -1, 0, 1, 2**15 - 1], dtype="<i2")
    wave_S, rate = decode_audio(write(tmp_path / "a.wav", samples, rate=8000))
    assert (rate, wave_S.dtype) == (8000, torch.float32)
    assert torch.equal(wave_S * 2**15, torch.from_numpy(samples.astype(np.float32)))


def test_channels_are_averaged(tmp_path):
    wave_S, _ = decode_audio(write(tmp_path / "a.wav", np.array([8, 16, -4, 4], dtype="<i2"), channels=2))
    assert (wave_S * 2**15).tolist() == [12.0, 0.0]


def test_what_is_no_wav_of_16_bits_is_refused_by_name(tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    narrow = write(tmp_path / "narrow.wav", np.zeros(4, dtype="u1"), width=1)
    cut = write(tmp_path / "cut.wav", np.zeros(400, dtype="<i2"))
    cut.write_bytes(cut.read_bytes()[:-100])
    for path, reason in (
        (tmp_path / "missing.wav", "No such file"),
        (tmp_path / "text.wav", "RIFF"),
        (narrow, "its samples have 8 bits, convert it to 16"),
        (cut, "it is truncated"),
        (tmp_path, "it is no regular file"),
    ):
        with pytest.raises(ValueError, match=rf"sound '.*{path.name}' could not be decoded \(.*{reason}"):
            decode_audio(path)


def test_a_model_that_hears_nothing_refuses_sound(tmp_path, processor):
    write(tmp_path / "a.wav", np.zeros(400, dtype="<i2"))
    messages = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "x"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": messages, "audios": ["a.wav"]}]))
    with pytest.raises(ValueError, match=r"sample '0' of .*: sound 'a\.wav': the model takes no sound"):
        Dataset(tmp_path / "data.json", processor).sample(0)


def test_sound_lies_in_the_media_root(tmp_path, processor):
    messages = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "x"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": messages, "audios": ["../a.wav"]}]))
    with pytest.raises(ValueError, match=r"media path '\.\./a\.wav' leaves the media root"):
        Dataset(tmp_path / "data.json", processor)
