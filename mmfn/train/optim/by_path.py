"""`by_path`: what differs between leaves, in one place for all optimizers: which decay, and at which learning rate."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mmfn.errors import UserError
from mmfn.train.optim.transform import Facts, Rate, Rules, Transform, UpdateFn, values
from mmfn.train.schedule import Schedule


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
    schedule) in place of the run's. `layer_decay`: a further factor, `layer_decay ** distance` (see `distances`). Rules
    hold for all that is in `transform` and are checked against all of its leaves; where one `by_path` holds another, a
    leaf that either leaves undecayed is, factors are multiplied, and the inner one's schedule counts. Raises ValueError
    from `update` for a regex that matches no path, and here for a `layer_decay` outside of (0, 1].

    >>> by_path(adamw(weight_decay=0.1), no_decay=[r".*bias"], lr_scales=[(r"vision/.*", 0.1)])
    """
    if not 0 < layer_decay <= 1:
        raise UserError(f"layer_decay must lie in (0, 1], got {layer_decay}; 1 gives all layers one learning rate")

    def update(facts: Mapping[str, Facts]) -> UpdateFn:
        plain = values(facts, [(pattern, False) for pattern in no_decay], True)
        scales, chosen = values(facts, lr_scales, 1.0), values(facts, schedules, None)

        def rate(path: str, known: Facts) -> Rate:
            scale = known.rate.scale * scales[path] * layer_decay**known.distance
            return Rate(scale=scale, schedule=chosen[path] or known.rate.schedule)

        return transform.update(
            {
                path: replace(known, rate=rate(path, known), is_decayed=known.is_decayed and plain[path])
                for path, known in facts.items()
            }
        )

    return replace(transform, update=update)
