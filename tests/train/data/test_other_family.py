"""The general code of data with the toy family, whose media, chats and processor are like no other's."""

from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmfn import tree
from mmfn.batch import AUDIO, IGNORE, IMAGE, Media, to
from mmfn.interop.inputs import batch_from_hf, samples_from_hf
from mmfn.model import Model
from mmfn.models import family_of
from mmfn.train.build.match import check_match
from mmfn.train.data import Processor, encode_sample, make_chat
from tests.models import toy_data, toy_family

TEMPLATE = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}<picture> {% elif p.type == 'audio' %}"
    "<sound> {% elif m.role == 'assistant' %}{% generation %}{{ p.text }} stop {% endgeneration %}{% else %}"
    "{{ p.text }} {% endif %}{% endfor %}{% endfor %}"
)
WORDS = ("other", "<picture>", "<sound>", "begin", "end", "what", "a", "bird", "stop")
PARTS = [{"type": "image"}, {"type": "audio"}, {"type": "image"}, {"type": "text", "text": "what"}]
USER = {"role": "user", "content": PARTS}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "a bird"}]}


@pytest.fixture(scope="module")
def model():
    cfg = toy_family.config_from_hf({})
    family = family_of(toy_family, "toy")
    return Model(family=family, cfg=cfg, params={"only": torch.zeros(1)}, hf_config={"picture_id": 1, "sound_id": 2})


@pytest.fixture(scope="module")
def processor(model):
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="other"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens([AddedToken(word, special=True) for word in WORDS[1:3]])
    data = model.family.data
    chat = make_chat(
        PreTrainedTokenizerFast(tokenizer_object=raw),
        data.chat,
        lambda tokens_T: model.family.kinds(tokens_T, model.cfg),
        TEMPLATE,
    )
    return Processor(chat=chat, media=data.processor({"image_processor": {"width": 6}}, model.cfg))


@pytest.fixture(scope="module")
def media(processor):
    image_u8 = torch.arange(3 * 4 * 6, dtype=torch.uint8).reshape(3, 4, 6)
    images = [processor.media.image(image_u8), processor.media.image(image_u8 + 9)]
    return {"image": images, "audio": [Media(inputs_UF=torch.ones(4, 5), grid=(4, 1, 1))]}


def test_a_conversation_becomes_a_batch(model, processor, media):
    sample = encode_sample([USER, ANSWER], processor, media, id="toy")
    names = [WORDS[token] for token in sample.tokens_T.tolist()]
    picture, sound = ["<picture>"] * 3, ["begin", *["<sound>"] * 4, "end"]
    assert names == [*picture, *sound, *picture, "what", "a", "bird", "stop"]
    assert (sample.kinds_T == IMAGE).sum() == 6
    assert (sample.kinds_T == AUDIO).sum() == 4
    assert [WORDS[token] for token in sample.labels_T[sample.labels_T != IGNORE].tolist()] == ["a", "bird", "stop"]
    batch = model.family.pack([sample], model.cfg)
    assert torch.equal(batch.towers["audio"].inputs_UF, media["audio"][0].inputs_UF)
    assert batch.towers["vision"].inputs_UF.shape == (12, 3)
    prompt = encode_sample([USER], processor, media, is_prompt=True)
    assert (prompt.labels_T == IGNORE).all()


def test_inputs_of_its_processor_are_the_same_batch(model, processor, media):
    """Its keys are its own, and sound needs no branch."""
    sample = encode_sample([USER, ANSWER], processor, media)
    inputs = {
        "input_ids": sample.tokens_T[None],
        "labels": sample.labels_T[None],
        "columns": torch.cat([one.inputs_UF for one in media["image"]]),
        "column_counts": [6, 6],
        "steps": media["audio"][0].inputs_UF,
        "step_counts": torch.tensor([4]),
    }
    batch, want = batch_from_hf(inputs, model), to(model.family.pack([sample], model.cfg), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(batch), tree.leaves(want), strict=True))
    with pytest.raises(ValueError, match="steps is missing although step_counts is given"):
        samples_from_hf({k: v for k, v in inputs.items() if k != "steps"}, model)
    with pytest.raises(ValueError, match="row 0 has 4 audio placeholder tokens but the next 1 audios give 8 features"):
        samples_from_hf(inputs | {"steps": torch.ones(8, 5), "step_counts": [8]}, model)
    with pytest.raises(ValueError, match="'pixel_values' is not used by toy"):
        samples_from_hf(inputs | {"pixel_values": torch.ones(1)}, model)


def test_what_must_agree_is_its_own(model, processor):
    check_match(model, processor)
    odd = replace(processor, media=toy_data.ToyProcessor(width=5))
    with pytest.raises(ValueError, match=r"width % 2 is 0 in config\.json but 1 in preprocessor_config\.json"):
        check_match(model, odd)
    with pytest.raises(ValueError, match=r"sound_id is 3 in config\.json but '<sound>' is 2 in the tokenizer"):
        check_match(replace(model, hf_config={"picture_id": 1, "sound_id": 3}), processor)


def test_ids_of_tokens_are_found_in_any_section_of_the_config(model, processor):
    """The outermost counts, and one that is nowhere is not compared."""
    for ids in ({"sound_id": 2}, {"sound_id": None, "audio_config": {"sound_id": 2}}, {}):
        check_match(replace(model, hf_config={"picture_id": 1, "thinker_config": ids}), processor)
    check_match(replace(model, hf_config={"sound_id": 2, "thinker_config": {"sound_id": 3}}), processor)
    for ids in ({"sound_id": 3}, {"audio_config": {"sound_id": 3}}):
        with pytest.raises(ValueError, match=r"sound_id is 3 in config\.json but '<sound>' is 2 in the tokenizer"):
            check_match(replace(model, hf_config={"picture_id": 1, "thinker_config": ids}), processor)
