"""Evaluation: answers against one-by-one generation, the loss against torch's cross entropy, the totals by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

import mmfn
from mmfn import tree
from mmfn.batch import IGNORE, in_floats
from mmfn.models.data.chat import read_template
from mmfn.train.build.processor import eos_token_ids, load_model_processor
from mmfn.train.build.run import Run, prepare
from mmfn.train.chat_options import ChatOptions
from mmfn.train.config.load import load_config
from mmfn.train.data import Dataset, load_processor
from mmfn.train.forward import Forward
from mmfn.train.run import evaluate as evaluation_module
from mmfn.train.run.answer import AnswerSettings, answer_prompts, encode_prompt, text_of
from mmfn.train.run.evaluate import (
    Answer,
    Evaluation,
    evaluate,
    to_json,
    truth_tokens,
)
from tests.batches import packed
from tests.tiny import model_of, random_samples


@pytest.fixture
def run(make_config: Callable[..., Path]) -> Run:
    return prepare(load_config(make_config()), say=lambda text: None)


def test_totals() -> None:
    answers = tuple(
        Answer(id=str(i), question="q", prediction=p, truth=t)
        for i, (p, t) in enumerate([("7", "7"), (" 7\n", "7"), ("7.", "7"), ("", "")])
    )
    evaluation = Evaluation(answers=answers, loss_sum=6.0, num_tokens=4, time_s=1.0)
    assert [a.is_correct for a in answers] == [True, True, False, True]
    assert (evaluation.num_correct, evaluation.accuracy, evaluation.loss) == (3, 0.75, 1.5)
    stored = json.loads(to_json(evaluation))
    assert (stored["accuracy"], stored["num_answers"], stored["answers"][2]["is_correct"]) == (0.75, 4, False)


def test_answers_do_not_depend_on_the_batch(run: Run) -> None:
    done: list[int] = []
    args = {"max_new_tokens": 3, "eos_token_ids": run.eos_token_ids}
    together = evaluate(Forward.of(run.model), run.held_out, batch_samples=24, **args)
    apart = evaluate(Forward.of(run.model), run.held_out, batch_samples=7, on_batch=done.append, **args)
    assert done == [7, 14, 21, 24]
    assert together.answers == apart.answers
    assert together.loss_sum == pytest.approx(apart.loss_sum, rel=1e-5)
    assert together.num_tokens == apart.num_tokens
    assert [a.id for a in together.answers] == [record.id for record in run.held_out.records]
    first = together.answers[0]
    assert first.question == "Which digit is this?"
    assert first.truth in "0123456789"
    assert Path(first.images[0]).is_file()


THINKS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>
{% endgeneration %}{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
CALL = {"function": {"name": "look", "arguments": {"digit": 7}}}
ANSWERS = {  # of the assistant, a template for it, and what is shown as the truth
    "plain": ({"content": "seven"}, None, "seven"),
    "the prompt opens the thinking": ({"content": "<think>\na\n</think>\n\nb"}, THINKS, "a\n</think>\n\nb"),
    "thinking is asked for, but not answered": ({"content": "b"}, THINKS, "b"),
    "special tokens": ({"content": "<|box_start|>(1,2)<|box_end|>"}, None, "<|box_start|>(1,2)<|box_end|>"),
    "a tool call": (
        {"content": "", "tool_calls": [CALL]},
        None,
        '<tool_call>\n{"name": "look", "arguments": {"digit": 7}}',
    ),
    "normalised": ({"content": "A\u0301 \ufb01"}, None, "\u00c1 fi"),
    "nothing": ({"content": ""}, None, ""),
}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("is_right", [True, False])
def test_the_tokens_that_are_trained_are_right_answers(
    run: Run, small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, is_right: bool
) -> None:
    """A model that gives a sample's own supervised tokens has accuracy 1, and none with one token more."""
    answer_of_data, template, shown = ANSWERS[kind]
    processor = load_model_processor(str(small_demo / "model"))
    if template is not None:
        processor = load_processor(small_demo / "model", template)
    if kind == "normalised":
        processor.chat.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "first"}]
    talk = [*turns, {"role": "user", "content": "two"}, {"role": "assistant", **answer_of_data}]
    (tmp_path / "d.json").write_text(json.dumps([{"messages": talk}]))
    held_out = Dataset(tmp_path / "d.json", processor)
    sample, (prompt, _) = held_out.sample(0), held_out.prompt(0)
    label_runs = (sample.labels_T != -100).long().diff().clamp(min=0).sum()
    assert label_runs == 2  # both answers are trained
    tail = sample.labels_T[sample.labels_T != -100].tolist()
    own = truth_tokens(sample, prompt)
    assert tail[-len(own) :] == own
    wrong = [] if is_right else processor.chat.tokenizer("!")["input_ids"]
    monkeypatch.setattr(evaluation_module, "generate", lambda *args, **kwargs: [[*wrong, *own]])
    found = evaluate(
        Forward.of(run.model), held_out, batch_samples=1, max_new_tokens=64, eos_token_ids=run.eos_token_ids
    )
    assert found.accuracy == float(is_right)
    assert found.answers[0].truth.startswith(shown)
    assert "<|im_end|>" not in found.answers[0].truth


LEARNED = {  # template, options, `loss` of the last answer, and its text
    "not learned": ("qwen3_vl", {}, False, "<think>\na\n</think>\n\nb"),
    "history is masked": ("qwen3_vl_thinking", {"mask_history": True}, True, "<think>\na\n</think>\n\nb"),
    "all is learned": ("qwen3_vl_thinking", {"train_on_prompt": True}, None, "b"),
    "an empty think block is not": ("qwen3_vl_thinking", {"train_empty_thinking": False}, None, "b"),
    "the prompt has an empty block": ("qwen3_5", {"enable_thinking": False}, None, "b"),
    "the prompt opens a block": ("qwen3_5", {"enable_thinking": True}, None, "<think>\na\n</think>\n\nb"),
    "the model opens it": ("qwen3_omni", {}, None, "<think>\na\n</think>\n\nb"),
}


@pytest.mark.parametrize("kind", LEARNED)
def test_the_answer_of_the_data_is_right_whatever_is_learned(
    run: Run, small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The truth is all of the last answer behind the prompt, once, and is followed by nothing."""
    name, options, loss, words = LEARNED[kind]
    processor = load_processor(small_demo / "model", read_template(name), ChatOptions(**options))
    talk = [("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", words), ("user", "three")]
    messages = [{"role": role, "content": text} for role, text in talk]
    messages[3] |= {} if loss is None else {"loss": loss}
    (tmp_path / "d.json").write_text(json.dumps([{"messages": messages}]))
    held_out = Dataset(tmp_path / "d.json", processor)
    own = truth_tokens(held_out.answer(0), held_out.prompt(0)[0])
    monkeypatch.setattr(evaluation_module, "generate", lambda *args, **kwargs: [own])
    found = evaluate(
        Forward.of(run.model), held_out, batch_samples=1, max_new_tokens=64, eos_token_ids=run.eos_token_ids
    )
    assert found.accuracy == 1.0
    prompt = processor.chat.tokenizer.decode(held_out.prompt(0)[0].tokens_T)
    whole = prompt[prompt.rindex("assistant\n") :] + found.answers[0].truth
    assert whole.count("b") == 1
    assert whole.endswith("b")
    assert "first" not in found.answers[0].truth


def test_what_is_behind_the_last_answer_is_not_its_truth(run: Run, small_demo: Path, tmp_path: Path) -> None:
    talk = [("user", "one"), ("assistant", "yes"), ("user", "two")]
    entries = [{"messages": [{"role": role, "content": text} for role, text in talk]}]
    (tmp_path / "d.json").write_text(json.dumps(entries))
    held_out = Dataset(tmp_path / "d.json", run.processor)
    tokens = truth_tokens(held_out.sample(0), held_out.prompt(0)[0])
    assert text_of(tokens, run.processor.chat.tokenizer, run.eos_token_ids) == "yes"


def test_single_answer_equals_evaluation(run: Run) -> None:
    args: Any = {"max_new_tokens": 3, "eos_token_ids": run.eos_token_ids}
    forward = Forward.of(run.model)
    evaluation = evaluate(forward, run.held_out, batch_samples=24, **args)
    for expected in evaluation.answers[:3]:
        prompts = [
            encode_prompt(run.processor, prompt, images=expected.images)
            for prompt in (expected.question, "<image>" + expected.question)
        ]
        texts = answer_prompts(forward, run.processor.chat.tokenizer, prompts, AnswerSettings(**args))
        assert texts == [expected.prediction] * 2


def test_answer_refuses_wrong_counts(run: Run) -> None:
    path = str(run.held_out.find_medium(0, run.held_out.records[0].images[0]))
    with pytest.raises(ValueError, match="2 image placeholders for 1 image"):
        encode_prompt(run.processor, "<image><image>?", images=[path])


def test_loss_equals_cross_entropy_of_the_logits(run: Run) -> None:
    samples = [run.held_out.sample(i) for i in range(5)]
    value, weight = Forward.of(run.model).loss_sums(samples, [0] * 5)[0]
    expected, count = 0.0, 0
    for sample in samples:
        (batch,) = run.loader.pack([sample])
        logits_TV = mmfn.logits(run.model, in_floats(batch))
        labels_T = sample.labels_T[1:]
        expected += torch.nn.functional.cross_entropy(logits_TV[:-1], labels_T, reduction="sum").item()
        count += int((labels_T != -100).sum())
    assert value == pytest.approx(expected, rel=1e-5)
    assert weight == count


def test_the_loss_is_that_of_next_tokens_alone() -> None:
    """Of a model with routers and a second head, which is not computed: its weights are no numbers."""
    model = model_of("toy")
    samples = random_samples(model, seed=3, num=4)
    bad = {**model.params, "mtp": tree.map(lambda x: x * torch.nan, model.params["mtp"])}
    value, weight = Forward.of(replace(model, params=bad)).loss_sums(samples, [0] * 4)[0]
    batch = packed(model, samples)
    logits_TV = mmfn.logits(model, batch)
    expected = torch.nn.functional.cross_entropy(logits_TV, batch.labels_T, reduction="sum")
    assert value == pytest.approx(expected.item(), rel=1e-6)
    assert weight == int((batch.labels_T != IGNORE).sum())


def test_eos_ids_come_from_the_generation_config(run: Run, tmp_path: Path) -> None:
    tokenizer = run.processor.chat.tokenizer
    both = tuple(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert run.eos_token_ids == both
    assert eos_token_ids(tmp_path, run.processor, 282) == both  # those of the family
    assert run.processor.chat.tokenizer.eos_token_id == both[0]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert eos_token_ids(tmp_path, run.processor, 282) == (5,)


@pytest.mark.parametrize("value", ['{"a": 1}', '["x"]', "true", "-1", "282", "[5, null]", "1.0", "1000000000"])
def test_eos_ids_that_are_no_tokens_are_refused(run: Run, tmp_path: Path, value: str) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(ValueError, match=r"eos_token_id is .* but must be a token id below vocab_size 282"):
        eos_token_ids(tmp_path, run.processor, 282)


def test_generation_config_that_is_no_json_is_refused(run: Run, tmp_path: Path) -> None:
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"generation_config.json"):
            eos_token_ids(tmp_path, run.processor, 282)


def test_loss_that_is_not_finite_is_null_and_refused() -> None:
    answers = (Answer(id="0", question="q", prediction="7", truth="7"),)
    for loss in (float("nan"), float("inf")):
        evaluation = Evaluation(answers=answers, loss_sum=loss, num_tokens=1, time_s=1.0)
        assert json.loads(to_json(evaluation), parse_constant=pytest.fail)["loss"] is None
        with pytest.raises(ValueError, match=r"the held-out loss is (nan|inf); the model's weights"):
            evaluation.check_finite()
