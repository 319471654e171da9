"""Random conversations with images, videos and sounds, through the library's own processors: tokens, kinds, places."""

import json
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.video_utils import VideoMetadata

from mmfn.batch import TEXT
from mmfn.models import family
from mmfn.models.data.chat import read_template
from mmfn.train.data import Processor, encode_sample, make_chat
from mmfn.train.data.template import render
from tests import oracles
from tests.oracles.models import oracle_class
from tests.oracles.torchvision import in_place_of_torchvision, library_class
from tests.train.data.chat_cases import KINDS, MODEL_TYPES, conversations, pad

T = transformers
SEES = "qwen2_vl.image_processing_qwen2_vl.Qwen2VLImageProcessor"
QWEN3 = (T.Qwen3VLProcessor, SEES, "qwen3_vl.video_processing_qwen3_vl.Qwen3VLVideoProcessor")
BLOCKS = (SEES, "qwen2_vl.video_processing_qwen2_vl.Qwen2VLVideoProcessor")
GLM = ("glm4v.image_processing_glm4v.Glm4vImageProcessor", "glm4v.video_processing_glm4v.Glm4vVideoProcessor")
LIBRARY = {  # template -> classes of the processor, its images and its videos
    "qwen2_5_vl": (T.Qwen2_5_VLProcessor, *BLOCKS),
    "qwen3_vl": QWEN3,
    "qwen3_5": QWEN3,
    "qwen3_omni": (T.Qwen3OmniMoeProcessor, *BLOCKS),
    "glm4v_moe": (Glm4vProcessor, *GLM),
}
CONFIG = {
    "patch_size": 4,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "size": {"shortest_edge": 256, "longest_edge": 8_000},
}
HOP = 160  # of a clip that is no multiple the library counts a frame more where another of the call is longer
IDS = {"image_token_id": "image", "video_token_id": "video", "audio_token_id": "audio"}


@pytest.fixture(scope="module")
def tokenizer(merging_tokenizer, tmp_path_factory):
    """With names for the tokens of media, which processors ask for."""
    folder = tmp_path_factory.mktemp("tokenizer")
    merging_tokenizer.save_pretrained(folder)
    kinds = ("vision", "audio")
    names = {
        f"{kind}_{mark}_token": f"<|{kind}_{end}|>"
        for kind in kinds
        for mark, end in (("bos", "start"), ("eos", "end"))
    }
    names |= {f"{kind}_token": f"<|{kind}_pad|>" for kind in ("image", "video", "audio")}
    return folder, T.AutoTokenizer.from_pretrained(folder, extra_special_tokens=names)


def settings_of(name, tokenizer):
    """(the library's config, mmfn's) whose tokens are the tokenizer's."""
    side = family(MODEL_TYPES[name]).data
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in side.chat.tokens.items()}
    more = {"audio": {"num_mel_bins": 128}} if name == "qwen3_omni" else {}
    theirs = oracles.config(
        family=MODEL_TYPES[name], text={"vocab_size": len(tokenizer)}, vision={"patch_size": 4}, **more, **ids
    )
    return theirs, family(MODEL_TYPES[name]).config_from_hf(json.loads(json.dumps(oracles.to_dict(theirs))))


def library(name, folder, tokenizer):
    processor, image, video = LIBRARY[name]
    plain = T.AutoTokenizer.from_pretrained(folder)  # whose image token is a Qwen's
    unchecked = {"check_argument_for_proper_class": lambda self, name, argument: type(argument)}
    more = {"feature_extractor": T.WhisperFeatureExtractor(feature_size=128)} if name == "qwen3_omni" else {}
    return type(processor.__name__, (processor,), unchecked)(
        image_processor=library_class(image)(**CONFIG),
        video_processor=library_class(video)(**CONFIG),
        tokenizer=tokenizer if name == "qwen3_omni" else plain,
        **more,
    )


def media_of(messages, draw, *, is_even):
    """Pixels and waves for all parts, videos of one rate. `is_even`: as many frames as GLM's sampling gives."""
    parts = [part["type"] for m in messages if isinstance(m["content"], list) for part in m["content"]]
    step = 2 if is_even else 1
    side = lambda: draw.randrange(8, 90)  # noqa: E731
    pixels = lambda *shape: torch.randint(256, shape, dtype=torch.uint8)  # noqa: E731
    return SimpleNamespace(
        rate=draw.choice([1.0, 2.0, 4.0]),
        images=[pixels(3, side(), side()) for _ in range(parts.count("image"))],
        videos=[pixels(draw.randrange(2, 9) // step * step, 3, side(), side()) for _ in range(parts.count("video"))],
        sounds=[0.1 * torch.randn(HOP * draw.randrange(50, 400)) for _ in range(parts.count("audio"))],
    )


def theirs(processor, text, media):
    """What the library's processor makes of a text and its media."""
    values = {"text": [text], "return_tensors": "pt"}
    if media.images:
        values["images"] = media.images
    if media.videos:
        values["videos"] = media.videos
        lengths = [len(frames_u8) for frames_u8 in media.videos]
        meta = [VideoMetadata(total_num_frames=n, fps=media.rate, frames_indices=list(range(n))) for n in lengths]
        values["videos_kwargs"] = {"video_metadata": meta, "do_sample_frames": False}
        if hasattr(processor, "audio_token"):
            values["videos_kwargs"] |= {"fps": media.rate, "size": CONFIG["size"]}  # else those of the library
    if media.sounds:
        values["audio"] = [wave_S.numpy() for wave_S in media.sounds]
    return processor(**values)


def library_positions(oracle, inputs):
    """[3, T]"""
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        return oracles.positions(oracle, inputs)[:, 0]
    frames = inputs["feature_attention_mask"].sum(1) if "feature_attention_mask" in inputs else None
    keys = {key: inputs[key] for key in ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw")}
    return oracle.get_rope_index(**keys, audio_seqlens=frames, second_per_grids=inputs["video_second_per_grid"])[0][
        :, 0
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in the library
@pytest.mark.parametrize("name", LIBRARY)
def test_mixed_conversations(tokenizer, name):
    folder, tok = tokenizer
    model_family, (hf_cfg, cfg) = family(MODEL_TYPES[name]), settings_of(name, tok)
    sections = {"image_processor": CONFIG, "video_processor": CONFIG, "feature_extractor": {"feature_size": 128}}
    kinds = partial(model_family.kinds, cfg=cfg)
    chat = make_chat(tok, model_family.data.chat, kinds, read_template(name))
    own = Processor(chat=chat, media=model_family.data.processor(sections, cfg))
    with torch.device("meta"):
        oracle = oracle_class(hf_cfg)._from_config(hf_cfg)
    draw, num_mixed = random.Random(name), 0
    torch.manual_seed(0)
    with in_place_of_torchvision():
        processor = library(name, folder, tok)
        for messages, tools in conversations(name, 80, seed=2):
            media = media_of(messages, draw, is_even=name == "glm4v_moe")
            if not (media.images and media.videos) or num_mixed == 20:
                continue
            for message in messages:  # an answer that begins with a line end is tokenized apart from its header
                if message["role"] == "assistant":
                    message["content"] = message["content"].lstrip()
            num_mixed += 1
            times = [[i / media.rate for i in range(len(frames_u8))] for frames_u8 in media.videos]
            sample = encode_sample(
                messages,
                own,
                {
                    "image": [own.media.image(image_u8) for image_u8 in media.images],
                    "video": [own.media.video(x, t, media.rate) for x, t in zip(media.videos, times, strict=True)],
                    "audio": [own.media.audio(wave_S) for wave_S in media.sounds],
                },
                tools=tools,
            )
            inputs = theirs(processor, render(messages, own.chat, tools=tools)[0], media)
            assert sample.tokens_T.tolist() == inputs["input_ids"][0].tolist()
            images_UF = torch.cat([image.in_floats().inputs_UF for image in sample.images])
            assert torch.equal(images_UF, inputs["pixel_values"])
            videos_UF = torch.cat([video.in_floats().inputs_UF for video in sample.videos])
            assert torch.equal(videos_UF, inputs["pixel_values_videos"])
            if "mm_token_type_ids" in inputs:
                assert sample.kinds_T.tolist() == inputs["mm_token_type_ids"][0].tolist()
            else:
                kinds = {tok.convert_tokens_to_ids(pad(name, kind)): code for kind, code in KINDS.items()}
                assert sample.kinds_T.tolist() == [kinds.get(token, TEXT) for token in sample.tokens_T.tolist()]
            places = model_family.positions(sample, cfg)
            assert torch.equal(places, library_positions(oracle, dict(inputs)).to(places.dtype))
    assert num_mixed == 20
