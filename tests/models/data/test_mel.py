import pytest
import torch
import transformers

from mmfn.models.data.mel import SoundSpec, log_mel

DEFAULTS = {"feature_size": 128, "sampling_rate": 16_000, "hop_length": 160, "n_fft": 400}
SPEC = SoundSpec.from_hf({}, DEFAULTS)


def wave(num, seed=0, loudness=0.1):
    g = torch.Generator().manual_seed(seed)
    return loudness * torch.randn(num, generator=g) + torch.sin(torch.arange(num) * 0.05)


@pytest.mark.parametrize("mels", [128, 80])
@pytest.mark.parametrize("num", [201, 16_000, 16_001, 9000, 15_999, 48_017, 320])
def test_frames_are_those_of_transformers_to_the_last_bit(num, mels):
    extract = transformers.WhisperFeatureExtractor(feature_size=mels, return_attention_mask=True)
    for sound in (wave(num, num), torch.zeros(num), wave(num, 1, 0.0) * (torch.arange(num) % 100 < 50)):
        settings = {"padding": True, "truncation": False, "return_attention_mask": True, "return_tensors": "pt"}
        out = extract([sound.numpy()], sampling_rate=16_000, **settings)
        got_UF = log_mel(sound, SoundSpec.from_hf({"feature_size": mels}, DEFAULTS))
        assert got_UF.shape == (num // 160, mels)
        assert int(out["attention_mask"].sum()) == num // 160
        assert torch.equal(got_UF, out["input_features"][0].T)


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (torch.zeros(200), "a clip needs at least 201 samples at 16000 Hz, got 200"),
        (torch.zeros(2, 400), r"sound must be float32\[S\], got torch.float32 \(2, 400\); mix it to one channel"),
        (torch.zeros(400, dtype=torch.int16), r"sound must be float32\[S\], got torch.int16"),
        (torch.full((400,), torch.nan), "a clip holds values that are not finite"),
    ],
)
def test_sound_that_is_refused(sound, message):
    with pytest.raises(ValueError, match=message):
        log_mel(sound, SPEC)


def test_settings_that_are_refused():
    for key, value in (("dither", 0.1), ("padding_value", 1.0), ("do_normalize", True)):
        with pytest.raises(ValueError, match=f"feature extractor option '{key}' is {value}"):
            SoundSpec.from_hf({key: value}, DEFAULTS)
    with pytest.raises(ValueError, match="num_mels of a feature extractor must be a positive integer, got 0"):
        SoundSpec.from_hf({"feature_size": 0}, DEFAULTS)
