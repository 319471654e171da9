import json
import shutil

import pytest

from mmfn.train.data.tokenizer import load_tokenizer, read_json, token_id


def test_round_trip(processor):
    tokenizer = processor.chat.tokenizer
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Wie heißt das? 汉字 12345\t<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert token_id(tokenizer, "<|image_pad|>") == ids[ids.index(token_id(tokenizer, "<|vision_start|>")) + 1]


def test_chat_template_json_is_read(tmp_path, digits):
    shutil.copytree(digits / "model", tmp_path / "model")
    source = (tmp_path / "model" / "chat_template.jinja").read_text(encoding="utf-8")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert load_tokenizer(tmp_path / "model").chat_template is None
    (tmp_path / "model" / "chat_template.json").write_text(json.dumps({"chat_template": source}), encoding="utf-8")
    assert load_tokenizer(tmp_path / "model").chat_template == source


def test_errors_are_one_sentence(tmp_path, processor):
    with pytest.raises(ValueError, match=r"missing' does not exist; give the folder that holds tokenizer\.json"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no tokenizer that loads") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"no token '<\|nothing\|>'"):
        token_id(processor.chat.tokenizer, "<|nothing|>")


def test_a_token_for_media_that_is_split(tmp_path, digits):
    shutil.copytree(digits / "model", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    (pad,) = (token for token in stored["added_tokens"] if token["content"] == "<|image_pad|>")
    stored["added_tokens"].remove(pad)
    stored["model"]["vocab"] |= {"<|image_pad|>": pad["id"]}
    path.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(ValueError, match=r"splits '<\|image_pad\|>'.*added_tokens"):
        token_id(load_tokenizer(tmp_path / "model"), "<|image_pad|>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not readable JSON"),
        ("[" * 100_000, "is not readable JSON"),
        ("[]", "must hold a JSON object, got list"),
    ],
)
def test_bad_json(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")


def test_missing_json(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json' is not readable JSON"):
        read_json(tmp_path / "a.json")
