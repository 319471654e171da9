"""Fixtures of the data tests: the digits example on disk, its processor, and golden files."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mmfn.train.data import Processor, load_processor

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
