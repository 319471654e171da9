"""Sound files of all kinds, written here, against soundfile and soxr by themselves, transformers, and formulas."""

import json
import math

import numpy as np
import pytest
import soundfile
import soxr
import torch
import transformers
from transformers.audio_utils import load_audio

from mmfn.errors import MissingPackageError
from mmfn.models.data import Sampling, qwen_omni
from mmfn.models.data.mel import SoundSpec, log_mel
from mmfn.train.data import Dataset, Limits, decode_audio, decode_video

RATE = 16_000
CODINGS = [
    ("wav", "PCM_U8"),
    ("wav", "PCM_16"),
    ("wav", "PCM_24"),
    ("wav", "PCM_32"),
    ("wav", "FLOAT"),
    ("wav", "DOUBLE"),
    ("flac", "PCM_16"),
    ("flac", "PCM_24"),
    ("ogg", "VORBIS"),
    ("mp3", "MPEG_LAYER_III"),
]
RATES = (16_000, 22_050, 44_100, 48_000)
CLIPS = [  # 40: every coding at every rate, in turns of one, two and six channels
    (*coding, rate, (1, 2, 2, 6)[(i + j) % 4] if coding[0] != "mp3" else 1 + (i + j) % 2)
    for i, coding in enumerate(CODINGS)
    for j, rate in enumerate(RATES)
]
NUM_SAMPLES = 9_001


def tones(num, rate, channels):
    """float64[num, channels]: another tone in each channel, and noise."""
    noise = np.random.default_rng(num + rate).standard_normal((num, channels))
    hertz = 300.0 * (1 + np.arange(channels))
    return 0.4 * np.sin(2 * np.pi * np.arange(num)[:, None] / rate * hertz) + 0.02 * noise


def write(path, samples, rate=RATE, coding="PCM_16"):
    soundfile.write(path, samples, rate, subtype=coding)
    return path


@pytest.mark.parametrize(("suffix", "coding", "rate", "channels"), CLIPS)
def test_clips_are_those_of_transformers_to_the_last_bit(tmp_path, suffix, coding, rate, channels):
    path = write(tmp_path / f"a.{suffix}", tones(NUM_SAMPLES, rate, channels), rate, coding)
    wave_S = decode_audio(path, RATE)
    with soundfile.SoundFile(path) as file:  # soundfile.read seeks first, after which MP3 differs in the last bit
        samples = file.read(dtype="float32", always_2d=True)
    expected = soxr.resample(samples.T.mean(0), rate, RATE, quality="HQ")
    assert wave_S.dtype == torch.float32
    assert wave_S.numel() == math.ceil(len(samples) * RATE / rate)
    assert abs(wave_S.numel() - len(expected)) <= 1
    both = min(wave_S.numel(), len(expected))
    assert torch.equal(wave_S[:both], torch.from_numpy(expected[:both]))
    assert not wave_S[both:].any()
    assert torch.equal(wave_S, torch.from_numpy(load_audio(str(path), sampling_rate=RATE, backend="soundfile")))
    extract = transformers.WhisperFeatureExtractor(feature_size=128)
    settings = {"padding": True, "truncation": False, "return_attention_mask": True, "return_tensors": "pt"}
    theirs = extract([load_audio(str(path), RATE, backend="soundfile")], sampling_rate=RATE, **settings)
    spec = SoundSpec.from_hf({}, qwen_omni.SOUND_DEFAULTS)
    assert torch.equal(log_mel(wave_S, spec), theirs["input_features"][0].T)
    assert torch.equal(decode_audio(path.read_bytes(), RATE), wave_S)
    measured_S = decode_audio(path, RATE, is_measured=True)
    assert measured_S.is_meta
    assert log_mel(measured_S, spec).shape == log_mel(wave_S, spec).shape
    assert measured_S.shape == wave_S.shape


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000])
def test_a_tone_stays_where_it_is(tmp_path, rate):
    """Of any rate, a tone of 1 kHz is the formula's at the model's; the ends feel the silence around the clip."""
    times = np.arange(rate) / rate
    path = write(tmp_path / "a.wav", np.stack([np.sin(2000 * np.pi * times), np.zeros(rate)], 1), rate, "DOUBLE")
    wave_S = decode_audio(path, RATE)
    assert wave_S.numel() == RATE
    expected = 0.5 * torch.sin(2000 * math.pi * torch.arange(RATE, dtype=torch.float64) / RATE)
    assert (wave_S - expected)[1000:-1000].abs().max() < 1e-4


@pytest.mark.parametrize("num", [1, 7, 441, 1000, 12_345])
def test_lengths_are_rounded_up(tmp_path, num):
    for rate in (8_000, 11_025, 44_100, 48_000):
        path = write(tmp_path / "a.wav", np.full(num, 0.25), rate)
        assert decode_audio(path, RATE).numel() == math.ceil(num * RATE / rate)


@pytest.mark.parametrize("coding", ["PCM_16", "PCM_24", "PCM_32"])
def test_samples_are_parts_of_the_largest(tmp_path, coding):
    samples = np.array([-(2**15), -1, 0, 1, 2**15 - 1], dtype="<i2")
    assert (decode_audio(write(tmp_path / "a.wav", samples, coding=coding), RATE) * 2**15).tolist() == samples.tolist()


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 7, 8, 9, 12, 17])
def test_channels_are_mixed_as_by_the_library(tmp_path, channels):
    path = write(tmp_path / "a.wav", tones(NUM_SAMPLES, 44_100, channels), 44_100, "FLOAT")
    assert np.array_equal(decode_audio(path, RATE).numpy(), load_audio(str(path), RATE, backend="soundfile"))


def test_channels_are_averaged(tmp_path):
    samples = np.array([[8, 16], [-4, 4]], dtype="<i2")
    assert (decode_audio(write(tmp_path / "a.wav", samples), RATE) * 2**15).tolist() == [12.0, 0.0]


def test_files_that_are_refused(tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "nothing.wav").write_bytes(b"")
    write(tmp_path / "silent.wav", np.zeros(0))
    for path, reason in (
        (tmp_path / "missing.wav", "No such file"),
        (tmp_path / "text.wav", "it is neither a sound file nor a video of a known format"),
        (tmp_path / "nothing.wav", "it is neither a sound file nor a video of a known format"),
        (tmp_path / "silent.wav", "it holds no samples"),
        (tmp_path, "it is no regular file"),
    ):
        with pytest.raises(
            ValueError, match=rf"sound '.*{path.name}' could not be decoded \(.*{reason}.*\); "
        ) as error:
            decode_audio(path, RATE)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("suffix", "coding"), [("wav", "PCM_16"), ("aiff", "PCM_16"), ("flac", "PCM_16"), ("mp3", None)]
)
def test_a_file_that_is_cut_off(tmp_path, suffix, coding):
    path = write(tmp_path / f"a.{suffix}", tones(NUM_SAMPLES, RATE, 1), coding=coding)
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 3])
    with pytest.raises(ValueError, match=r"a\.\w+' could not be decoded \((it is cut off: it says|.*lost sync)"):
        decode_audio(path, RATE)


def test_streams_that_do_not_know_their_length(tmp_path):
    samples = tones(NUM_SAMPLES, RATE, 1)
    wav, flac = write(tmp_path / "a.wav", samples), write(tmp_path / "a.flac", samples)
    expected = decode_audio(wav, RATE)
    data = bytearray(wav.read_bytes())
    place = data.index(b"data") + 4
    data[4:8] = data[place : place + 4] = b"\xff" * 4  # as ffmpeg writes into a pipe
    wav.write_bytes(data)
    data = bytearray(flac.read_bytes())
    data[21] &= 0xF0  # the lower 36 bits of bytes 21 ... 25: samples, 0 where they are unknown
    data[22:26] = bytes(4)
    flac.write_bytes(data)
    assert torch.equal(decode_audio(wav, RATE), expected)
    with pytest.raises(ValueError, match="it does not say how long it is: write it anew with ffmpeg"):
        decode_audio(flac, RATE)


def test_limits_hold_before_anything_is_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.flac", tones(RATE, RATE, 2))
    assert decode_audio(path, RATE, Limits(audio_seconds=1.0, audio_values=2 * RATE)).numel() == RATE
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    for limits, seconds in ((Limits(audio_seconds=0.25), 0.25), (Limits(audio_values=RATE), 0.5)):
        with pytest.raises(ValueError, match=rf"with 2 channels at 16000 Hz it may last {seconds} s by max_audio_sec"):
            decode_audio(path, RATE, limits)
    for rate in (999, 2_000_000_000):
        with pytest.raises(ValueError, match=rf"its rate is {rate} Hz but must be in 1000 \.\.\. 768000"):
            decode_audio(write(tmp_path / "a.wav", np.zeros(100), rate), RATE)
    for value in (0.0, math.nan):
        with pytest.raises(ValueError, match="audio_seconds must be positive"):
            Limits(audio_seconds=value)


def write_video(path, samples, codec, rate, layout):
    """A sound track of float32[channels, num] beside two black frames."""
    av = pytest.importorskip("av", reason="PyAV is an optional dependency")
    with av.open(str(path), "w") as container:
        sights = container.add_stream("mpeg4", rate=2)
        sights.width, sights.height, sights.pix_fmt = 64, 48, "yuv420p"
        stream = container.add_stream(codec, rate=rate, layout=layout)
        for _ in range(2):
            container.mux(sights.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(sights.encode())
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32), format="fltp", layout=layout)
        frame.sample_rate = rate
        size = stream.codec_context.frame_size or None
        cutter = av.AudioResampler(format=stream.format.name, layout=layout, rate=rate, frame_size=size)
        for part in (*cutter.resample(frame), *cutter.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_tracks_of_videos_without_loss_are_their_samples(tmp_path, rate, layout):
    samples = np.round(tones(rate, rate, 1 + (layout == "stereo")) * 2**15) / 2**15
    path = write_video(tmp_path / "a.avi", samples.T, "pcm_s16le", rate, layout)
    expected = decode_audio(write(tmp_path / "a.wav", samples, rate, "FLOAT"), RATE)
    assert torch.equal(decode_audio(path, RATE), expected)


def test_a_track_with_loss_sounds_the_same(tmp_path):
    samples = tones(44_100, 44_100, 2)
    path = write_video(tmp_path / "a.mp4", samples.T, "aac", 44_100, "stereo")
    expected = decode_audio(write(tmp_path / "a.wav", samples, 44_100, "FLOAT"), RATE)
    spectra = [torch.fft.rfft(wave_S[:RATE]).abs() for wave_S in (decode_audio(path, RATE), expected)]
    assert [s.topk(2).indices.sort().values.tolist() for s in spectra] == [[300, 600]] * 2
    with pytest.raises(ValueError, match=r"it may last 0\.5 s by max_audio_seconds"):
        decode_audio(path, RATE, Limits(audio_seconds=0.5))


def test_a_playlist_reads_no_other_file(tmp_path):
    """FFmpeg by itself would follow them out of the folder, by a path or by a link."""
    av = pytest.importorskip("av", reason="PyAV is an optional dependency")
    root = tmp_path / "root"
    root.mkdir()
    secret = write_video(tmp_path / "secret.mp4", tones(RATE, RATE, 1).T, "aac", RATE, "mono")
    (root / "link.mp4").symlink_to(secret)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{secret}\n#EXT-X-ENDLIST\n"
    for name, text in (("clip.m3u8", playlist), ("clip.mp4", "ffconcat version 1.0\nfile link.mp4\n")):
        (root / name).write_text(text)
        with av.open(str(root / name)) as container:
            assert next(container.decode(audio=0)).samples > 0
        with pytest.raises(
            ValueError, match=r"could not be decoded \(it is neither a sound file nor a video of a known"
        ):
            decode_audio(root / name, RATE)
        with pytest.raises(ValueError, match=rf"{name}' could not be decoded"):
            decode_video(
                root / name, Sampling(fps=2.0, select=lambda num_frames, rate: [0], size=lambda *shape: shape[1:])
            )


def test_without_pyav_only_sound_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    assert decode_audio(write(tmp_path / "a.flac", tones(400, RATE, 1)), RATE).numel() == 400
    (tmp_path / "a.mp4").write_bytes(b"anything")
    with pytest.raises(
        MissingPackageError, match=r"a\.mp4' has .* PyAV, which reads .*; install it \(pip install mmfn.video.\)"
    ):
        decode_audio(tmp_path / "a.mp4", RATE)


def test_a_model_that_hears_nothing_refuses_sound(tmp_path, processor):
    write(tmp_path / "a.wav", np.zeros(400))
    messages = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "x"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": messages, "audios": ["a.wav"]}]))
    with pytest.raises(ValueError, match=r"sample '0' of .*: the model takes no sound; remove it"):
        Dataset(tmp_path / "data.json", processor).sample(0)


def test_sound_lies_in_the_media_root(tmp_path, processor):
    messages = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "x"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": messages, "audios": ["../a.wav"]}]))
    with pytest.raises(ValueError, match=r"media path '\.\./a\.wav' leaves the media root"):
        Dataset(tmp_path / "data.json", processor).sample(0)
