"""Do a model and a processor belong together? What must agree is the family's to say."""

from mmfn.errors import UserError
from mmfn.model import Model
from mmfn.models.hf_config import sections
from mmfn.train.data import Processor


def check_match(model: Model, processor: Processor) -> None:
    """Raise ValueError unless the processor makes what the model reads: media of its sizes, tokens it has."""
    for fact in model.family.data.facts(model.cfg, processor.media):
        if fact.config != fact.processor:
            raise UserError(
                f"{fact.name} is {fact.config} in config.json but {fact.processor} in {fact.source}; {fact.remedy}"
            )
    vocabulary = processor.chat.tokenizer.get_vocab()
    largest = max(vocabulary.values())
    if largest >= model.cfg.vocab_size:
        raise UserError(
            f"the tokenizer has token id {largest} but the model's vocab_size is {model.cfg.vocab_size}; use the "
            "tokenizer of the model"
        )
    for key, token in model.family.data.chat.tokens.items():
        stored = (section[key] for _, section in sections(model.hf_config) if section.get(key) is not None)
        configured = getattr(model.cfg, key, next(stored, None))  # the first has the defaults of absent keys
        if configured is not None and configured != vocabulary.get(token):
            raise UserError(
                f"{key} is {configured} in config.json but {token!r} is {vocabulary.get(token)} in the tokenizer; use "
                "the tokenizer of the model"
            )
