"""Fixtures of the data tests: the digits example on disk, its processor, and golden files."""

import importlib.util
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import trainers

from mmfn.train.data import Chat, Processor, load_processor
from tests.train.data import chat_cases

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def digits_module() -> Any:
    spec = importlib.util.spec_from_file_location("digits_example", ROOT / "examples" / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory, digits_module: Any) -> Path:
    out = tmp_path_factory.mktemp("digits")
    digits_module.write_demo(out)
    return out


@pytest.fixture(scope="session")
def processor(digits: Path) -> Processor:
    return load_processor(digits / "model")


@pytest.fixture(scope="session")
def media_goldens() -> dict[str, Any]:
    return json.loads((ROOT / "tests" / "goldens" / "media.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def chat_goldens() -> list[dict[str, Any]]:
    return json.loads((ROOT / "tests" / "goldens" / "chats.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def chat_tokenizer(digits_module: Any) -> Any:
    """One token per byte, and the special tokens of all families."""
    return digits_module.make_tokenizer(chat_cases.SPECIAL)


@pytest.fixture(scope="session")
def merging_tokenizer(chat_tokenizer: Any) -> Any:
    """The same with merges: words, line ends and punctuation join across borders."""
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False)
    corpus = ["assistant\nuser\nyo\n\n\nWhat? ...\n\n<think>\n\n</think>\n\nHello:\n\n \n\n ok.\n<0.2 seconds>"] * 50
    return chat_tokenizer.train_new_from_iterator(corpus, 700, initial_alphabet=trainer.initial_alphabet)


@pytest.fixture(scope="session")
def make_chat(chat_tokenizer: Any) -> Callable[..., Chat]:
    """A chat of a template, or of its text without blocks, as a checkpoint has it."""

    return cache(partial(chat_cases.chat_of, chat_tokenizer))
