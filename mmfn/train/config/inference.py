"""What of a config counts for evaluation and generation, which train nothing and may run on other ranks."""

from collections.abc import Collection, Mapping, Sequence
from math import gcd
from pathlib import Path
from typing import Any

from mmfn.errors import UserError
from mmfn.train.config.learning import FreezeSection, LoraSection
from mmfn.train.config.load import Settings, check
from mmfn.train.config.schema import Config


def for_inference(config: Config, num_ranks: int) -> Config:
    """The config with nothing to be trained, and its layout brought to so many ranks.

    A layout of other sizes becomes dp over all ranks, with as many of its ep as divide them: answers are the same on
    any, so a model trained on many ranks is evaluated on a few. An adapter is that of `model.adapter`.
    """
    trained = {"freeze": FreezeSection(), "lora": LoraSection()}
    layout = config.layout
    if layout.sizes.world != num_ranks:
        sizes = {"replicate": 1, "dp": num_ranks, "cp": 1, "ulysses": 1, "ep": gcd(layout.ep, num_ranks)}
        layout = layout.model_copy(update=sizes)
    return config.model_copy(update={**trained, "layout": layout})


LONGEST = "eval.max_new_tokens"
ASKED = frozenset(
    (
        "eval.batch_samples",
        *("data.format", "data.columns", "data.tags", "data.ignore", "data.root", "data.template"),
        *("data.enable_thinking", "data.video_outer_marks", "data.max_image_pixels", "data.max_audio_seconds"),
        *("data.max_video_seconds", "data.image_min_pixels", "data.image_max_pixels", "data.video_min_pixels"),
        *("data.video_max_pixels", "data.video_fps", "data.video_maxlen", "data.audio_sampling_rate"),
        "data.use_audio_in_video",
    )
)
"""The settings that count where a checkpoint is asked, beside those of the model and the layout."""


def checkpoint_config(
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    counting: Collection[str] = ASKED,
) -> Config:
    """The config of a checkpoint that is asked, for a command that has no file: what of it trains is never read.

    `model`, `data`: settings of these sections. `counting`: further settings that the command reads. Raises ValueError
    as `load_config` does, and for an override that counts in training alone.
    """
    values: dict[str, Mapping[str, Any]] = {
        "data": {"train": "unused", "eval": "unused", "token_buckets": [1], "tower_buckets": {}, **data},
        "optimizer": {"lr": 1.0},
        "train": {"steps": 1},
        "output": {"path": "unused"},
        "model": model,
    }
    settings = Settings(values=values, path=Path("command line"), origins={}).overridden(overrides)
    for key in settings.origins:
        if key.partition(".")[0] not in ("model", "layout") and key not in counting:
            fix = "give --max-new-tokens" if key == LONGEST else "remove it"
            raise UserError(f"override: {key} has no effect here, where nothing is trained; {fix}")
    return check(settings).config
