"""The media of records: settings of single ones, budgets of a run, and measuring without decoding."""

import io
import json
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmfn.batch import Media
from mmfn.models.data import SETTINGS, glm_vision, qwen2_vision, qwen_omni, qwen_vision
from mmfn.train.build.processor import load_model_processor
from mmfn.train.data import Dataset, decode_image, image
from mmfn.train.data.image import image_size
from mmfn.train.data.media import MediaReader
from mmfn.train.data.processor import settings_texts
from mmfn.train.data.records import Record, parse_record
from tests.train.data.clips import write_clip

pytest.importorskip("av", reason="PyAV is an optional dependency")
PIXELS = {"patch_size": 4, "size": {"shortest_edge": 256, "longest_edge": 9000}}
SECTIONS = {"image_processor": PIXELS, "video_processor": PIXELS, "feature_extractor": {"feature_size": 80}}
CFG = SimpleNamespace(positions_per_second=13.0)
FAMILIES = {"qwen3_vl": qwen_vision, "qwen2_vl": qwen2_vision, "glm4v": glm_vision, "omni": qwen_omni}


@pytest.fixture(params=FAMILIES)
def media(request):
    return FAMILIES[request.param].processor(SECTIONS, CFG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of all orientations and formats, clips of several codecs, sounds of several rates."""
    out, draw = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    for place in range(24):
        suffix = ("jpg", "png", "webp", "tiff", "gif", "bmp")[place % 6]
        height, width = (int(side) for side in draw.integers(3, 200, 2))
        picture = Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 1 + place // 3
        picture.save(out / f"{place}.{suffix}", **({"exif": exif} if suffix in ("jpg", "png", "webp", "tiff") else {}))
    for place, (suffix, codec) in enumerate((("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("gif", "gif"))):
        size = 2 * int(draw.integers(16, 50)), 2 * int(draw.integers(16, 50))
        matrix = (0, 1, -1, 0) if suffix == "mp4" else (1, 0, 0, 1)
        write_clip(out / f"v{place}.{suffix}", codec=codec, num=21 + 9 * place, rate=10, size=size, matrix=matrix)
    Image.fromarray(draw.integers(0, 256, (60, 80, 3), np.uint8)).save(out / "x.png")
    write_clip(out / "v4.mkv", stamps_ms=[0, 100, 900, 1000, 4000, 4100, 9000])
    for place, (suffix, rate) in enumerate((("wav", 44_100), ("flac", 16_000), ("mp3", 22_050), ("ogg", 48_000))):
        soundfile.write(out / f"s{place}.{suffix}", 0.1 * draw.standard_normal((30_011, 2)), rate)
    return out


def same_size(one: Media, two: Media) -> bool:
    return two.inputs_UF.is_meta and (one.grid, one.times, one.seconds_per_grid, one.inputs_UF.shape) == (
        two.grid,
        two.times,
        two.seconds_per_grid,
        two.inputs_UF.shape,
    )


def test_measured_media_are_those_decoded_without_their_values(media, folder):
    names = sorted(path.name for path in folder.iterdir())
    images = [name for name in names if name[0] not in "sv"]
    videos = [*(name for name in names if name[0] == "v"), tuple(images[:1] * 5)]
    sounds = [name for name in names if name[0] == "s"] if "sound_spec" in media.__dataclass_fields__ else []
    record = Record(id="", messages=(), images=tuple(images), videos=tuple(videos), audios=tuple(sounds))
    reader = MediaReader(media)
    read, measured = reader.read(record, folder.joinpath), reader.measure(record, folder.joinpath)
    assert [len(measured[kind]) for kind in read] == [len(images), len(videos), len(sounds)]
    for kind, items in read.items():
        for name, one, two in zip((*images, *videos, *sounds), items, measured[kind], strict=False):
            assert same_size(one, two), (kind, name)
        assert media.texts({kind: items}) == media.texts({kind: measured[kind]})


def test_measuring_is_cheap(media, tmp_path):
    """At least 5 times as fast as decoding a JPEG file of a megapixel."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 120, 3), np.uint8)).resize((1000, 1000)).save(
        tmp_path / "a.jpg"
    )
    reader, record = MediaReader(media), Record(id="", messages=(), images=("a.jpg",))

    def least(call):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            call(record, tmp_path.joinpath)
            times.append(time.perf_counter() - start)
        return min(times)

    assert least(reader.read) > 5 * least(reader.measure)


def png(orientation, *, is_late):
    """A PNG file, 7 x 5 pixels, whose EXIF stands ahead of the pixels or behind."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (7, 5)).save(buffer, "PNG", exif=exif)
    data = buffer.getvalue()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    rest, chunk, last = data[:start] + data[end:], data[start:end], data.index(b"IEND") - 4 - (end - start)
    return rest[:last] + chunk + rest[last:] if is_late else data


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_of_png_follow_an_orientation_behind_the_pixels(orientation, is_late):
    data = png(orientation, is_late=is_late)
    assert image_size(data) == tuple(decode_image(data).shape[1:]) == ((7, 5) if orientation > 4 else (5, 7))


def test_sizes_come_from_headers(monkeypatch):
    data = png(6, is_late=False)
    Image.init()  # one of Pillow's plugins loads an image of its own
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr(image.ImageOps, "exif_transpose", None)
    assert image_size(data) == (7, 5)


def part(kind, path, **settings):
    return {"type": kind, kind: path, **settings}


def record_of(*parts, **lists):
    user, answer = {"role": "user", "content": list(parts)}, {"role": "assistant", "content": "x"}
    return parse_record({"messages": [user, answer], **lists}, "0")


def test_settings_stand_in_a_part_or_beside_a_path():
    record = record_of(
        part("image", "a.png", max_pixels=64),
        {"type": "image"},
        {"type": "video", "fps": 1},
        {"type": "image", "min_pixels": 9},
        images=[{"image": "b.png", "max_pixels": 7}, "c.png"],
        videos=[{"video": ["d.png"], "use_audio_in_video": False}],
    )
    assert record.images == ("a.png", "b.png", "c.png")
    assert record.settings == {
        ("image", 0): {"max_pixels": 64},
        ("image", 1): {"max_pixels": 7},
        ("image", 2): {"min_pixels": 9},
        ("video", 0): {"use_audio_in_video": False, "fps": 1},
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (part("image", "a", max_pixel=3), "unknown key 'max_pixel' of a part of type image, nearest is 'max_pixels'"),
        (part("image", "a", fps=1), "unknown key 'fps' of a part of type image"),
        (part("video", "a", total_pixels=1), "unknown key 'total_pixels' of a part of type video, nearest is"),
        (part("audio", "a", sampling_rate=1), "unknown key 'sampling_rate' of a part of type audio"),
        (
            part("image", "a", max_pixels=1.5),
            "'max_pixels' of a part of type image must be an integer above 0, got 1.5",
        ),
        (
            part("image", "a", max_pixels=True),
            "'max_pixels' of a part of type image must be an integer above 0, got True",
        ),
        (part("image", "a", max_pixels=0), "'max_pixels' of a part of type image must be an integer above 0, got 0"),
        (part("video", "a", fps=0), "'fps' of a part of type video must be a number above 0, got 0"),
        (part("video", "a", fps="2"), "'fps' of a part of type video must be a number above 0, got '2'"),
        (
            part("video", "a", video_start=-1.0),
            "'video_start' of a part of type video must be a number of 0 or more, got -1.0",
        ),
    ],
)
def test_settings_that_mean_nothing_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        record_of(wrong)


def sizes(media, folder, *parts):
    read = MediaReader(media).measure(record_of(*parts), folder.joinpath)
    return [one.grid for kind in ("image", "video") for one in read[kind]]


def test_pixels_of_a_part_are_its_own(media, folder):
    plain, less, shaped, square = sizes(
        media,
        folder,
        part("image", "x.png"),
        part("image", "x.png", max_pixels=2000, min_pixels=64),
        part("image", "x.png", resized_height=16, resized_width=48),
        part("image", "x.png", resized_height=17, resized_width=17, min_pixels=1),
    )
    assert plain[1] * plain[2] * 16 > 2000 >= less[1] * less[2] * 16
    assert shaped[2] == 3 * shaped[1]
    assert square in ((1, 4, 4), (1, 8, 8))


def test_frames_of_a_part_are_its_own(media, folder):
    family = type(media).__name__
    one, slow, few, piece = sizes(
        media,
        folder,
        part("video", "v2.avi"),
        part("video", "v2.avi", fps=1.0, **({} if family == "GlmProcessor" else {"min_frames": 2})),
        part("video", "v2.avi", max_frames=4, max_pixels=4000),
        part("video", "v2.avi", video_start=1.0, video_end=3.0),
    )
    assert slow[0] < one[0]
    assert few[0] == 2
    assert piece[0] == 2
    if family == "GlmProcessor":
        with pytest.raises(ValueError, match=r"video 'v2\.avi': nframes means nothing to GLM"):
            sizes(media, folder, part("video", "v2.avi", nframes=6))
    else:
        assert sizes(media, folder, part("video", "v2.avi", nframes=6))[0][0] == 3
        with pytest.raises(ValueError, match="nframes says how many frames are read, and so does fps; keep one"):
            sizes(media, folder, part("video", "v2.avi", nframes=6, fps=1))
        with pytest.raises(ValueError, match="nframes is 1 but a video has at least 2 frames; raise it"):
            sizes(media, folder, part("video", "v2.avi", nframes=1))


def test_lists_of_frames_have_the_rate_they_say(folder, processor):
    """`<0.5 seconds>` is the mean of the first pair at one frame a second."""
    frames = ["1.png"] * 4
    path = folder / "list.jsonl"
    turns = record = {"messages": [{"role": "user", "content": [part("video", frames, fps=1)]}]}
    record["messages"] = [*turns["messages"], {"role": "assistant", "content": "x"}]
    path.write_text(json.dumps(record))
    sample = Dataset(path, processor).sample(0)
    assert sample.videos[0].times == (0.5, 2.5)
    with pytest.raises(ValueError, match="all frames of a list are taken, so that nframes has no meaning; list fewer"):
        sizes(processor.media, folder, part("video", frames, nframes=2))


def test_what_is_set_of_one_kind_leaves_the_other(media):
    changed = media.with_settings("image", {"max_pixels": 512})
    assert (changed.image_spec.max_pixels, changed.video_spec) == (512, media.video_spec)
    low = media.with_settings("video", {"max_pixels": 64})  # below the lower bound, which moves along
    assert (low.video_spec.pixels.min_pixels, low.video_spec.pixels.max_pixels) == (64, 64)
    high = media.with_settings("video", {"min_pixels": 10**6})
    assert high.video_spec.pixels.max_pixels == 10**6
    for name in ("resized_height", "resized_width"):
        with pytest.raises(ValueError, match="resized_height and resized_width belong together"):
            media.with_settings("image", {name: 8})
    with pytest.raises(ValueError, match="fps of a video processor must be a positive number, got 0"):
        media.with_settings("video", {"fps": 0})
    assert set(SETTINGS) == {"image", "video", "audio"}


def test_sections_say_what_a_processor_does(request, media):
    side = FAMILIES[request.node.callspec.params["media"]]
    settings = {"max_pixels": 5000, "fps": 3.0, "max_frames": 10}
    changed = media.with_settings("video", settings).with_settings("image", {"min_pixels": 400})
    assert changed != media
    assert side.processor({**SECTIONS, **json.loads(json.dumps(changed.sections()))}, CFG) == changed


@pytest.mark.parametrize("is_one_file", [False, True])
def test_a_checkpoint_is_given_the_bounds_it_was_trained_with(digits, tmp_path, is_one_file):
    out = tmp_path / "model"
    out.mkdir()
    for path in (digits / "model").iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    if is_one_file:  # as newer libraries write it
        files = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
        both = {name: json.loads((out / file).read_text()) for name, file in files.items()}
        (out / "processor_config.json").write_text(json.dumps({**both, "processor_class": "kept"}))
        for file in files.values():
            (out / file).unlink()
    else:
        config = json.loads((out / "preprocessor_config.json").read_text())
        (out / "preprocessor_config.json").write_text(json.dumps({**config, "min_pixels": 256, "max_pixels": 256}))
    settings = {"image": {"max_pixels": 1024}, "video": {"fps": 1.0, "max_frames": 8, "max_pixels": 2048}}
    changed = load_model_processor(str(out), settings=settings)
    assert changed.media.image_spec.max_pixels == 1024
    assert (changed.media.video_spec.fps, changed.media.video_spec.max_frames) == (1.0, 8)
    for name, text in settings_texts(out, changed.media).items():
        (out / name).write_text(text)
    assert load_model_processor(str(out)).media == changed.media
    assert (out / "processor_config.json").exists() == is_one_file
    with pytest.raises(ValueError, match=r"the settings data\.video_\.\.\. do not fit the model: fps of"):
        load_model_processor(str(out), settings={"video": {"fps": 0}})


def test_media_may_lie_beside_the_entry(folder, media):
    """Bytes, as of a member of a tar file, in the place of a path; a source may hold some of them."""
    record = record_of(part("image", "1.png"), part("video", "in/the/row.mp4"), part("video", ["1.png", "x.png"]))
    stored = {"in/the/row.mp4": (folder / "v0.mp4").read_bytes(), "x.png": (folder / "1.png").read_bytes()}
    read = MediaReader(media).read(record, lambda name: stored.get(name, folder / name))
    files = MediaReader(media).read(
        record_of(part("image", "1.png"), part("video", "v0.mp4"), part("video", ["1.png", "1.png"])), folder.joinpath
    )
    for kind in ("image", "video"):
        for one, two in zip(read[kind], files[kind], strict=True):
            assert torch.equal(one.inputs_UF, two.inputs_UF)
    with pytest.raises(ValueError, match=r"image 'b\.png': image bytes could not be decoded"):
        MediaReader(media).read(record_of(part("image", "b.png")), {"b.png": b"no"}.get)


def test_random_settings_measure_what_they_decode(media, folder):
    draw = random.Random(0)
    is_glm = type(media).__name__ == "GlmProcessor"
    for _ in range(30):
        settings = {"max_pixels": draw.randrange(64, 9000), "fps": draw.choice([0.5, 1, 3])}
        if draw.random() < 0.5 and not is_glm:
            settings = {"nframes": draw.randrange(2, 9), "resized_height": 33, "resized_width": draw.randrange(9, 90)}
        if draw.random() < 0.5:
            settings |= {"video_start": draw.random(), "video_end": 1.5 + draw.random()}
        name = draw.choice(["v0.mp4", "v1.mkv", "v2.avi"])
        reader, record = MediaReader(media), record_of(part("video", name, **settings))
        assert same_size(*(call(record, folder.joinpath)["video"][0] for call in (reader.read, reader.measure))), (
            name,
            settings,
        )


def test_the_size_of_frames_is_that_of_all_of_them(media):
    """Resized one by one as they are decoded, or together: the same."""
    frames_u8 = torch.randint(256, (5, 3, 37, 61), dtype=torch.uint8)
    size = media.sampling().size(5, 37, 61)
    small = torch.nn.functional.interpolate(frames_u8, size, mode="bicubic", antialias=True)
    one, two = media.video(frames_u8, [0.0] * 5, 2.0), media.video(small, [0.0] * 5, 2.0, (37, 61))
    assert torch.equal(one.inputs_UF, two.inputs_UF)
    assert replace(one, inputs_UF=two.inputs_UF) == two
