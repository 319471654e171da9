"""Settings that are sound by themselves but change nothing on the model they are for: refused when it is known."""

from typing import Any

from mmfn.spec import has_experts
from mmfn.train.config.schema import Config
from mmfn.tree import Tree


def check_effects(config: Config, cfg: Any, specs: Tree) -> None:
    """Raise ValueError for settings about more layers than the model `cfg` has, or about experts it does not have.

    `specs`: the model's parameters.
    """
    chosen, num_text, num_vision = config.layout, cfg.num_layers, cfg.vision.depth
    text = max(num_text, num_vision) if chosen.remat_vision is None else num_text
    for key, depth in {"remat": text, "remat_vision": num_vision}.items():
        for name in (f"{key}_every", f"{key}_layers"):
            if chosen.is_changed(name) and getattr(chosen, name) > depth:
                raise ValueError(
                    f"layout.{name} is {getattr(chosen, name)} but more than the {depth} layers there are has no "
                    f"effect; use at most {depth}"
                )
    if has_experts(specs):
        return
    idle = {
        f"output.experts {config.output.experts!r}": config.output.is_changed("experts"),
        "layout.remat_save 'experts'": "experts" in chosen.remat_save,
    }
    for what in (what for what, is_set in idle.items() if is_set):
        raise ValueError(f"{what} has no effect, the model has no experts; remove it")
