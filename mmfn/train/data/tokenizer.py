"""Tokenizers: loaded from a local folder through transformers, never running code that came with a checkpoint."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from mmfn.errors import UserError
from mmfn.train.data.entries import show

Tokenizer = Any  # a transformers PreTrainedTokenizerFast; the library ships no types


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """The tokenizer in folder `path`, with its chat template if one lies beside it.

    Raises ValueError when the folder holds no tokenizer, or one without a fast (Rust) implementation: labels need the
    character offsets that only those give.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"tokenizer folder {str(path)!r} does not exist; give the folder that holds tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # depending on what is broken the library raises OSError, KeyError, TypeError, ...
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"folder {str(path)!r} holds no tokenizer that loads ({first}); add its tokenizer.json"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer in {str(path)!r} has no fast implementation; convert it to tokenizer.json")
    if not tokenizer.chat_template and (folder / "chat_template.json").exists():
        tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
    return tokenizer


def own_template(tokenizer: Tokenizer) -> str:
    """The chat template that came with a tokenizer; empty where there is none.

    Raises ValueError where there are several, which older files list by name: the library chooses by what is asked.
    """
    own = tokenizer.chat_template or ""
    if isinstance(own, list):
        own = {one.get("name"): one.get("template") for one in own if isinstance(one, dict)}
    if isinstance(own, dict):
        if len(own) != 1:
            raise UserError(f"the tokenizer has several chat templates ({show([*own])}); give one as data.template")
        (own,) = own.values()
    if not isinstance(own, str):
        raise UserError(f"the tokenizer's chat template is no text but {show(own)}; give one as data.template")
    return own


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a single special token. Raises ValueError when the tokenizer does not know it or splits it."""
    number = tokenizer.get_vocab().get(token)
    if number is None:
        raise UserError(f"the tokenizer has no token {token!r}, which stands for media; use the tokenizer of the model")
    if tokenizer(token, add_special_tokens=False)["input_ids"] != [number]:
        raise UserError(
            f"the tokenizer splits {token!r}, which stands for media; list it in added_tokens of tokenizer.json"
        )
    return int(number)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ValueError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not readable JSON ({error}); repair the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} must hold a JSON object, got {type(value).__name__}")
    return value
