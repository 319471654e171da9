"""The fastest choice that fits, without planning all of them.

Every batch and layout is planned once with all blocks computed again. Of each size of batch the best few go on: of what
does not fit, as little as does it goes to the host; what fits is computed again less and less, until it does not.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from mmfn.errors import UserError
from mmfn.parallel.planning.plan import Plan, size
from mmfn.train.config.schema import Config
from mmfn.train.planning.choice import Budget, Choice, Space
from mmfn.train.planning.device_file import planned_device
from mmfn.train.planning.request import measure_config, run_request
from mmfn.train.planning.search import planners
from mmfn.train.planning.step_plan import Measured

BEAM = 2  # layouts of each size of batch that go on

Planner = Callable[[Config], Plan]  # Raises ValueError for a layout that cannot be planned
Together = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # `map`, or one on several threads


def suggest(
    space: Space, plan: Planner, together: Together = map, say: Callable[[str], None] = lambda line: None
) -> list[Choice]:
    """All choices that were planned, the best first. Raises ValueError where none can be planned or none fits."""

    def choose(budget: Budget, layout: Mapping[str, Any]) -> Choice | str:
        try:
            config = space.config(budget, layout)
            return Choice(config=config, plan=plan(config), fill=budget.fill)
        except UserError as error:
            return str(error)

    def begin(start: tuple[Budget, Mapping[str, Any]]) -> Choice | str:
        budget, layout = start
        return choose(budget, {**layout, **space.policies(layout)[-1], **_moved(space.offloads()[0])})

    starts = list(space.layouts())
    say(f"planning {len(starts)} layouts for {space.world} ranks of {space.device}")
    begun = list(zip(starts, together(begin, starts), strict=True))
    planned = [(start, first) for start, first in begun if isinstance(first, Choice)]
    if not planned:
        reason = next((first for _, first in begun if isinstance(first, str)), "there is none")
        raise UserError(f"no layout of {space.world} ranks can be planned: {reason}")
    planned.sort(key=lambda item: (item[0][0].tokens, item[1].rank))
    beam = [item for _, group in groupby(planned, key=lambda item: item[0][0].tokens) for item in list(group)[:BEAM]]
    say(f"{len(beam)} of them go on, with less computed again and more on the host")
    climbs = together(lambda item: list(_climb(space, item[0], item[1], choose)), beam)
    choices = sorted([*(first for _, first in planned), *(c for climb in climbs for c in climb)], key=lambda c: c.rank)
    if not choices[0].fits:
        least = min(choices, key=lambda c: c.plan.peak_bytes)
        raise UserError(
            f"nothing fits {space.world} ranks of {space.device}, the least is {size(least.plan.peak_bytes)} of "
            f"{size(planned_device(space.device).memory_bytes)} a rank; use more ranks, or LoRA"
        )
    return choices


def _climb(
    space: Space,
    start: tuple[Budget, Mapping[str, Any]],
    first: Choice,
    choose: Callable[[Budget, Mapping[str, Any]], Choice | str],
) -> Iterator[Choice]:
    """Choices of one batch and layout from what it began with."""
    budget, layout = start
    policies, offloads = space.policies(layout), space.offloads()

    def at(policy: int, offload: tuple[str, ...]) -> Choice | None:
        found = choose(budget, {**layout, **policies[policy], **_moved(offload)})
        return found if isinstance(found, Choice) else None

    def up(policy: int, offload: tuple[str, ...]) -> Iterator[tuple[int, Choice]]:
        """Less and less is computed again, as long as it fits."""
        while policy >= 0 and (found := at(policy, offload)) is not None:
            yield policy, found
            if not found.fits:
                return
            policy -= 1

    last, offload, fits = len(policies) - 1, offloads[0], first.fits
    for more in offloads[1:] if not fits else ():
        if (found := at(last, more)) is not None:
            yield found
            offload, fits = more, found.fits
            if fits:
                break
    if not fits:
        return
    policy = last
    for place, found in up(last - 1, offload):
        yield found
        policy = place if found.fits else policy
    with_activations = tuple(dict.fromkeys(("activations", *offload)))
    if policy > 0 and offload != with_activations and set(with_activations) in map(set, offloads):
        yield from (found for _, found in up(policy - 1, with_activations))


def _moved(offload: Sequence[str]) -> dict[str, Any]:
    return {"offload": list(offload)} if offload else {}


class Measures:
    """Plans in this process. What was measured is the same on all devices, so it is kept by the settings it depends on.

    `sample_tokens`: the length of samples that is planned with.
    """

    def __init__(self, sample_tokens: int) -> None:
        self._sample_tokens = sample_tokens
        self._known: dict[str, Measured] = {}

    def plan(self, config: Config, device_name: str) -> Plan:
        """The plan of a config, with its own largest buckets, on a device. Raises ValueError where there is none."""
        names = {"layout", "data", "lora", "freeze", "optimizer", "objective"}
        sections = config.model_dump(mode="json", include=names)
        key = json.dumps([config.model.path, config.model.dtype, config.model.table, config.train.compile, sections])
        if key not in self._known:
            request = run_request(config, device_name, sample_tokens=self._sample_tokens)
            self._known[key] = measure_config(request)
        return self._known[key].on(planned_device(device_name))


@contextmanager
def planner(device_name: str, jobs: int, sample_tokens: int) -> Iterator[tuple[Planner, Together]]:
    """A planner for one device, each config with its own largest buckets, and a map that keeps its processes busy.

    With one job it is this process.
    """
    if jobs == 1:
        measures = Measures(sample_tokens)
        yield lambda config: measures.plan(config, device_name), map
        return
    with ThreadPoolExecutor(2 * jobs, thread_name_prefix="mmfn-suggest") as threads, planners(jobs) as submit:

        def plan(config: Config) -> Plan:
            found = submit(run_request(config, device_name, sample_tokens=sample_tokens)).result()
            if isinstance(found, str):
                raise UserError(found)
            return found

        yield plan, threads.map
