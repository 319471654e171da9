"""Settings that change nothing on the model they are for."""

from typing import Any

import pytest

from mmfn import models
from mmfn.train.config.effects import check_effects
from mmfn.train.config.schema import Config
from tests.parallel.plan_cases import hf_config


def check(moe: bool, **sections: dict[str, Any]) -> None:
    """Of a model with four text blocks and a tower of two."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"path": ""},
        "data": {"train": "", "token_buckets": [64], "patch_buckets": [64]},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1},
    }
    config = Config.model_validate({**settings, **sections, "output": {"path": "", **sections.get("output", {})}})
    hf = hf_config(moe=moe, layers=4)
    family = models.family(hf["model_type"])
    cfg = family.config_from_hf(hf)
    check_effects(config, cfg, family.specs(cfg))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"remat": "full", "remat_every": 5}, "remat_every is 5 but more than the 4 layers there are has no effect"),
        ({"remat": "block", "remat_layers": 9}, "remat_layers is 9 .* use at most 4"),
        ({"remat_vision": "block", "remat_vision_layers": 3}, "remat_vision_layers is 3 .* use at most 2"),
        ({"remat": "selective", "remat_save": ["matmul", "experts"]}, "layout.remat_save 'experts' has no effect"),
    ],
)
def test_of_layers_and_experts_that_are_not_there(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(False, layout=layout)


def test_of_a_layout_of_experts() -> None:
    with pytest.raises(ValueError, match=r"output.experts 'transformers' has no effect, the model has no experts"):
        check(False, output={"experts": "transformers"})


def test_what_has_an_effect_is_taken() -> None:
    check(False, layout={"remat": "uniform", "remat_layers": 4})
    check(False, layout={"remat": "block", "remat_layers": 4, "remat_vision": "block", "remat_vision_layers": 2})
    check(True, layout={"remat": "selective", "remat_save": ["experts"]}, output={"experts": "transformers"})
