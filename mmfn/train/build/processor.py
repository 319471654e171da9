"""From a config to the processor of its model: chats, media, and the tokens that end an answer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mmfn.errors import UserError
from mmfn.interop.checkpoint import read_config
from mmfn.models import family
from mmfn.models.data.chat import read_template
from mmfn.train.chat_options import PUBLISHED, ChatOptions
from mmfn.train.data import Processor, load_processor
from mmfn.train.data.tokenizer import read_json


def load_model_processor(
    path: str, options: ChatOptions = PUBLISHED, settings: Mapping[str, Mapping[str, float]] = MappingProxyType({})
) -> Processor:
    """Tokenizer, chat template and media settings of a model's folder; `options.template` is used instead of its own.

    `settings`: of the config, which are put in place of the folder's, by kind of media. Raises ValueError for a folder
    that is missing or incomplete, first of all one without a readable config.json.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"model.path {path!r} is no folder; give the folder of a Hugging Face checkpoint")
    read_config(folder)  # before the tokenizer, whose loader reads the file too and blames itself
    processor = load_processor(folder, _template(options.template, folder), options)
    for kind, values in settings.items():
        try:
            processor = replace(processor, media=processor.media.with_settings(kind, values))
        except UserError as error:
            raise UserError(f"the settings data.{kind}_... do not fit the model: {error}") from error
    return processor


def _template(name: str | None, folder: Path) -> str:
    """The source of a template that the model's family brings, or of a file; "" for None."""
    if name is None:
        return ""
    known = family(str(read_json(folder / "config.json").get("model_type"))).data.chat.templates
    if name in known:
        return read_template(name)
    try:
        source = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.template {name!r} cannot be read ({error}); give a text file, or one of {', '.join(known)}"
        ) from error
    if not source.strip():
        raise UserError(f"data.template {name!r} is empty; give a template, or leave it out for the model's own")
    return source


def eos_token_ids(folder: Path, processor: Processor, vocab_size: int) -> tuple[int, ...]:
    """Tokens that end an answer: those of generation_config.json, or else the tokenizer's own and the family's.

    Some published checkpoints have no such file, and in config.json a token that ends no answer.

    Raises ValueError for a file that is no JSON object, or ids that are no tokens of the model.
    """
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.exists() else None
    if eos is None:
        eos = _end_tokens(processor)
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise UserError(
            f"eos_token_id is {eos!r} in {str(path)!r} but must be a token id below vocab_size {vocab_size}, or a "
            "list of them; correct the file"
        )
    return tuple(ids)


def published_sampling(folder: Path) -> dict[str, float]:
    """What generation_config.json of a checkpoint says of sampling, by the fields of `Sampling`; {} without the file.

    As transformers 5.23 reads it: without `do_sample` answers are greedy, and with it an absent `temperature` is 1 and
    an absent `top_k` 50. Raises ValueError for a file that is no JSON object, and values that are no numbers.
    """
    path = folder / "generation_config.json"
    stored = {key: value for key, value in (read_json(path) if path.exists() else {}).items() if value is not None}
    found: dict[str, float] = {}
    if stored.get("do_sample", False):
        found = {name: stored.get(name, default) for name, default in SAMPLED.items()}
    if "repetition_penalty" in stored:
        found["repetition_penalty"] = stored["repetition_penalty"]
    for name, value in found.items():
        if type(value) not in ((int,) if name == "top_k" else (int, float)):
            raise UserError(f"{name} is {value!r} in {str(path)!r} but must be a number; correct the file")
    return found


SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""What transformers samples with where a generation_config.json that samples does not say it."""


def with_end_tokens(folder: Path, ids: Sequence[int]) -> dict[str, Any] | None:
    """The generation_config.json of a checkpoint with the tokens that end an answer; None where it has them.

    Without it transformers would go by config.json, where some published checkpoints name a token that ends none.
    """
    path = folder / "generation_config.json"
    settings = read_json(path) if path.exists() else {}
    return {**settings, "eos_token_id": list(ids)} if settings.get("eos_token_id") is None else None


def _end_tokens(processor: Processor) -> list[int]:
    tokenizer, marks = processor.chat.tokenizer, processor.chat.format.marks
    ids = [tokenizer.eos_token_id, *map(tokenizer.get_vocab().get, marks.stops if marks else ())]
    return list(dict.fromkeys(token for token in ids if token is not None))
