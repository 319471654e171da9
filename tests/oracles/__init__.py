"""Tiny random models of transformers, and inputs for them: the oracle of many tests."""

import transformers

from tests.oracles.conversations import TEXT_KEYS, inputs, kinds_of, labelled, rows_of
from tests.oracles.models import (
    ATOL,
    RTOL,
    arguments,
    build,
    narrow_atol,
    oracle_class,
    positions,
    real_logits,
    run,
    save,
    to_dict,
)
from tests.oracles.recipes import IMAGE_ID, PAD_ID, RECIPES, config, model_type, random_config

CLASSES = {name: recipe.classes for name, recipe in RECIPES.items()}
TYPES = tuple(RECIPES)

__all__ = [
    "ATOL",
    "CLASSES",
    "IMAGE_ID",
    "PAD_ID",
    "RECIPES",
    "RTOL",
    "TEXT_KEYS",
    "TYPES",
    "arguments",
    "build",
    "config",
    "inputs",
    "kinds_of",
    "labelled",
    "model_type",
    "narrow_atol",
    "oracle_class",
    "positions",
    "random_config",
    "real_logits",
    "rows_of",
    "run",
    "save",
    "to_dict",
    "transformers",
]
