"""`by_path`: what differs between leaves, in one place for all optimizers: which decay, and at which learning rate."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mmfn.train.optim.transform import Facts, Rate, Rules, Transform, UpdateFn, values
from mmfn.train.schedule import Schedule

LAYER = re.compile(r"(.*/layers)/(\d+)/.*")  # a stack and the number of a block in it


def by_path(
    transform: Transform,
    *,
    no_decay: Sequence[str] = (),
    lr_scales: Rules = (),
    schedules: Sequence[tuple[str, Schedule]] = (),
    layer_decay: float = 1.0,
) -> Transform:
    """`transform` with rules for single leaves; regexes match whole paths, the first that does wins.

    `no_decay`: leaves without weight decay. `lr_scales`: (regex, factor) of the learning rate. `schedules`: (regex,
    schedule) in place of the run's. `layer_decay`: a further factor, see `depth_scales`. Rules hold for all that is in
    `transform` and are checked against all of its leaves. Raises ValueError from `update` for a regex that matches no
    path, and here for a `layer_decay` outside of (0, 1].

    >>> by_path(adamw(weight_decay=0.1), no_decay=[r".*bias"], lr_scales=[(r"vision/.*", 0.1)])
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must lie in (0, 1], got {layer_decay}; 1 gives all layers one learning rate")

    def update(facts: Mapping[str, Facts]) -> UpdateFn:
        plain = values(facts, [(pattern, False) for pattern in no_decay], True)
        scales, depths = values(facts, lr_scales, 1.0), depth_scales(list(facts), layer_decay)
        chosen = values(facts, schedules, None)
        return transform.update(
            {
                path: replace(
                    known,
                    rate=Rate(scale=scales[path] * depths[path], schedule=chosen[path]),
                    is_decayed=plain[path],
                )
                for path, known in facts.items()
            }
        )

    return replace(transform, update=update)


def depth_scales(paths: Sequence[str], decay: float) -> dict[str, float]:
    """Factors by depth, `decay ** distance`: layer-wise learning rates as for fine-tuning encoders.

    The distance of a block is counted back from the last one of its stack (`.../layers/7/...`), which has 0. Leaves
    outside of stacks stand behind all text blocks and have 0, but embeddings (and positions) before the first block
    of theirs. Source: Bao et al. 2022 (BEiT), appendix; Clark et al. 2020 (ELECTRA), section 3.
    """
    found = {path: LAYER.fullmatch(path) for path in paths}
    last: dict[str, int] = {}
    for match in filter(None, found.values()):
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))

    def distance(path: str) -> int:
        if match := found[path]:
            return last[match[1]] - int(match[2])
        stack = f"{path.split('/')[0]}/layers"
        is_input = any(part in ("embed", "patch_embed", "positions") for part in path.split("/"))
        return last[stack] + 1 if is_input and stack in last else 0

    return {path: decay ** distance(path) for path in paths}
