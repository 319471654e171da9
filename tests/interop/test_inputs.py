"""`batch_from_hf`: what processors return, packed, and what is refused."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, Qwen3VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import mmfn
from mmfn import tree
from mmfn.batch import IGNORE, is_on_host
from mmfn.interop.checkpoint import read_config
from mmfn.interop.hf import from_hf
from tests import oracles

F = 3 * 2 * 3 * 3


@pytest.fixture(scope="module")
def model():
    return mmfn.init(oracles.config().to_dict())


@pytest.fixture
def inputs():
    return oracles.inputs(oracles.config(), 4, rows=3)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def test_rows_become_segments_without_padding(model, inputs):
    batch = mmfn.batch_from_hf(inputs, model)
    mask = inputs["attention_mask"].bool()
    assert torch.equal(batch.tokens_T, inputs["input_ids"][mask])
    assert batch.segments.offsets_N.diff().tolist() == mask.sum(1).tolist()
    assert (batch.labels_T == IGNORE).all()
    assert not batch.weights_T.any()


def test_left_padding_and_derived_kinds_give_the_same_batch(model, inputs):
    want = mmfn.batch_from_hf(inputs, model)
    left = oracles.inputs(oracles.config(), 4, rows=3, pad="left")
    assert not torch.equal(left["input_ids"], inputs["input_ids"])
    assert same(mmfn.batch_from_hf(left, model), want)
    del left["mm_token_type_ids"]
    assert same(mmfn.batch_from_hf(left, model), want)


def test_padding_may_hold_any_token(model, inputs):
    want = mmfn.batch_from_hf(inputs, model)
    noisy = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, oracles.IMAGE_ID)
    assert same(mmfn.batch_from_hf(inputs | {"input_ids": noisy}, model), want)


def test_images_and_videos_are_dealt_to_rows_in_reading_order(model, inputs):
    together = mmfn.batch_from_hf(inputs, model)
    alone = [mmfn.batch_from_hf(row, model) for row in oracles.rows_of(inputs)]
    assert torch.equal(
        together.towers["vision"].inputs_UF, torch.cat([one.towers["vision"].inputs_UF for one in alone])
    )
    assert torch.equal(
        together.towers["vision"].coords_P4, torch.cat([one.towers["vision"].coords_P4 for one in alone])
    )


def test_lists_none_and_a_missing_mask_are_accepted(model):
    row = oracles.inputs(oracles.config(), 0, rows=1, images=0, videos=0)
    plain = {"input_ids": row["input_ids"].tolist(), "pixel_values": None}
    assert same(mmfn.batch_from_hf(plain, model), mmfn.batch_from_hf(row, model))


def test_arrays_are_accepted(model, inputs):
    arrays = {key: value.numpy() for key, value in inputs.items()}
    arrays["pixel_values"] = list(arrays["pixel_values"])
    assert same(mmfn.batch_from_hf(arrays, model), mmfn.batch_from_hf(inputs, model))


def test_labels_are_shifted_within_rows(model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
    batch = mmfn.batch_from_hf(inputs | {"labels": labels}, model)
    ends = batch.segments.offsets_N[1:].long() - 1
    assert (batch.labels_T[ends] == IGNORE).all()
    assert int((batch.labels_T != IGNORE).sum()) == batch.tokens_T.numel() - 3
    inside = torch.ones_like(batch.tokens_T, dtype=torch.bool)
    inside[ends] = False
    assert torch.equal(batch.labels_T[inside], batch.tokens_T.roll(-1)[inside])


def test_unknown_keys_are_refused(model, inputs):
    with pytest.raises(ValueError, match="'pixel_value' is not used by qwen3_vl; nearest is 'pixel_values'"):
        mmfn.batch_from_hf(inputs | {"pixel_value": 0}, model)
    with pytest.raises(ValueError, match="input_ids is missing"):
        mmfn.batch_from_hf({"labels": inputs["input_ids"]}, model)


def edited(inputs, key, edit):
    value = inputs[key].clone()
    edit(value)
    return inputs | {key: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i | {"input_ids": i["input_ids"][0]}, r"input_ids has shape \[\d+\] but \[rows, columns\]"),
        (lambda i: i | {"attention_mask": i["attention_mask"][:, 1:]}, "attention_mask has shape"),
        (lambda i: i | {"input_ids": [[1, 2], [3]]}, "input_ids of type list is no rectangular array of numbers"),
        (lambda i: i | {"input_ids": i["input_ids"] + 0.5}, "input_ids is of torch.float32 but integers are needed"),
        (
            lambda i: i | {"image_grid_thw": i["image_grid_thw"].double()},
            "image_grid_thw is of torch.float64 but integers",
        ),
        (
            lambda i: i | {"pixel_values": i["pixel_values"].byte()},
            "pixel_values is of torch.uint8 but floats are needed",
        ),
        (lambda i: i | {"pixel_values": i["pixel_values"] * 1j}, "pixel_values is of torch.complex64 but floats are"),
        (lambda i: i | {"pixel_values": "an image"}, "pixel_values of type str is no rectangular array of numbers"),
        (lambda i: edited(i, "input_ids", lambda x: x.__setitem__((0, 0), 97)), r"range over \d+..97 but .* has 97"),
        (lambda i: edited(i, "input_ids", lambda x: x.__setitem__((0, 0), -1)), "range over -1"),
        (lambda i: edited(i, "attention_mask", lambda x: x.__setitem__((0, 2), 0)), "mask of row 0 has holes"),
        (lambda i: edited(i, "attention_mask", lambda x: x[1].zero_()), "mask of row 1 is empty"),
        (lambda i: edited(i, "attention_mask", lambda x: x.__setitem__((0, 0), 2)), "values other than 0 and 1"),
        (lambda i: i | {"labels": i["input_ids"]}, "labels of row . supervise padding tokens"),
        (lambda i: edited(i, "mm_token_type_ids", lambda x: x.__setitem__((0, 0), 1)), "row 0 contradict input_ids"),
        (
            lambda i: {k: v for k, v in i.items() if k != "pixel_values"},
            "pixel_values is missing although image_grid_thw",
        ),
        (
            lambda i: {k: v for k, v in i.items() if k != "image_grid_thw"},
            "image_grid_thw is missing although pixel_val",
        ),
        (lambda i: i | {"pixel_values": i["pixel_values"][1:]}, rf"pixel_values has shape .* need \[\d+, {F}\]"),
        (lambda i: i | {"pixel_values": i["pixel_values"][:, 1:]}, rf"pixel_values has shape .* need \[\d+, {F}\]"),
        (
            lambda i: i | {"image_grid_thw": i["image_grid_thw"][0]},
            r"image_grid_thw of shape \[3\] must be \[media, 3\]",
        ),
        (lambda i: edited(i, "image_grid_thw", lambda x: x.__setitem__((0, 0), 0)), "must be .* entries of at least 1"),
        (lambda i: edited(i, "image_grid_thw", lambda x: x.__setitem__((0, 1), 3)), "no multiple of 2"),
    ],
)
def test_inputs_that_disagree_are_refused(model, change, message):
    inputs = oracles.inputs(oracles.config(), 4, rows=3)
    assert {"pixel_values", "pixel_values_videos"} <= inputs.keys()
    with pytest.raises(ValueError, match=message) as caught:
        mmfn.batch_from_hf(change(inputs), model)
    assert "\n" not in str(caught.value)


def test_more_or_fewer_images_than_placeholders_are_refused(model, inputs):
    for key in ("image_grid_thw", "pixel_values"):
        inputs[key] = torch.cat([inputs[key], inputs[key]])
    with pytest.raises(ValueError, match=r"\d images are left over after all \d+ image placeholder tokens"):
        mmfn.batch_from_hf(inputs, model)
    for key in ("image_grid_thw", "pixel_values"):
        del inputs[key]
    with pytest.raises(ValueError, match=r"has \d+ image placeholder tokens but the next 0 images give 0 features"):
        mmfn.batch_from_hf(inputs, model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_librarys_tokenizer_and_image_processor_return_is_read(side, full_demo):
    folder = full_demo / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    files = sorted((full_demo / "images").rglob("*.png"))
    images = [Image.open(file).resize(size) for file, size in zip(files, [(8, 8), (20, 9), (12, 30)], strict=False)]
    media = processor(images=images, return_tensors="pt")
    counts = (media["image_grid_thw"].prod(-1) // processor.merge_size**2).tolist()
    pads = ["<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in counts]
    texts = [f"{pads[0]}{pads[1]} Which digits are these?", "No image.", f"Look: {pads[2]}."]
    inputs = {**tokenizer(texts, return_tensors="pt", padding=True), **media}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()

    model = mmfn.init(read_config(folder))
    batch = mmfn.batch_from_hf(BatchFeature(inputs), model)
    oracle = oracles.build(Qwen3VLConfig.from_pretrained(folder))
    named = {name: p.detach() for name, p in oracle.named_parameters()}
    model = replace(model, params=from_hf(named, model))
    want_TV = oracles.real_logits(oracle, inputs).detach()
    torch.testing.assert_close(mmfn.logits(model, batch), want_TV, rtol=oracles.RTOL, atol=oracles.ATOL)
    arrays = {**tokenizer(texts, return_tensors="np", padding=True), **processor(images=images, return_tensors="np")}
    assert same(mmfn.batch_from_hf(arrays, model), batch)


def test_the_batch_is_on_the_models_device(model, inputs):
    elsewhere = replace(model, params=tree.map(lambda p: p.to("meta"), model.params))
    for path, leaf in tree.items(mmfn.batch_from_hf(inputs, elsewhere)):
        assert leaf.device.type == ("cpu" if is_on_host(path) else "meta"), path


def test_inputs_are_not_changed(model, inputs):
    before = {key: value.clone() for key, value in inputs.items()}
    batch = mmfn.batch_from_hf(inputs, model)
    replace(batch, tokens_T=batch.tokens_T.zero_())
    assert all(torch.equal(inputs[key], value) for key, value in before.items())
