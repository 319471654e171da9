"""The fastest choice that fits, without planning all of them.

Every batch and layout is planned with all blocks computed again: of what does not fit, as little as does it goes to the
host. Of each size of batch the best few go on, computed again less and less, until they do not fit.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby, islice
from math import inf
from typing import Any

from mmfn.errors import UserError, spell_count
from mmfn.parallel.planning.plan import Plan, size
from mmfn.train.config.schema import Config
from mmfn.train.planning.choice import Budget, Choice, IdleError, Space, step_of
from mmfn.train.planning.device_file import planned_device
from mmfn.train.planning.request import Request, measure_config, run_request
from mmfn.train.planning.search import planners
from mmfn.train.planning.step_plan import Measured

BEAM = 4  # layouts of each size of batch that go on

Start = tuple[Budget, Mapping[str, Any]]  # a batch and a layout
Offload = tuple[str, ...]
Planner = Callable[[Config, int | None], Plan]
"""(config, micro-batches of a step; None: as the config says) -> plan. Raises ValueError where there is none."""
Together = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # `map`, or one on several threads


def suggest(
    space: Space, plan: Planner, together: Together = map, say: Callable[[str], None] = lambda line: None
) -> list[Choice]:
    """All choices that were planned, the best first. Raises ValueError where none can be planned or none fits."""

    def choose(budget: Budget, layout: Mapping[str, Any]) -> Choice | UserError:
        try:
            config = space.config(budget, layout)
            micro_batches, fill = step_of(config, budget)
            return Choice(config=config, plan=plan(config, micro_batches), fill=fill)
        except UserError as error:
            return error

    def begin(starts: Iterable[Start], offload: Sequence[str]) -> list[Choice | UserError]:
        def one(start: Start) -> Choice | UserError:
            budget, layout = start
            return choose(budget, {**layout, **space.policies(layout)[-1], **_moved(offload)})

        return list(together(one, starts))

    starts = list(space.layouts())
    if not starts:
        raise UserError(f"no layout of {spell_count(space.world, 'rank')} can be planned: {space.no_layout()}")
    say(f"planning {spell_count(len(starts), 'layout')} for {spell_count(space.world, 'rank')} of {space.device}")
    begun = begin(starts, space.offloads()[0])
    planned = [(start, first) for start, first in zip(starts, begun, strict=True) if isinstance(first, Choice)]
    if not planned:
        reasons = [first for first in begun if isinstance(first, UserError)]
        reason = min(reasons, key=lambda error: isinstance(error, IdleError))  # what another layout may heal comes last
        raise UserError(f"no layout of {spell_count(space.world, 'rank')} can be planned: {reason}")
    choices, fitting = _fit(planned, space.offloads(), begin)
    fitting.sort(key=lambda item: (item[0][0].tokens, item[2].rank))
    groups = groupby(fitting, key=lambda item: item[0][0].tokens)
    beam = [item for _, group in groups for item in islice(group, BEAM)]
    say(f"{len(beam)} of them go on, with less computed again")
    climbs = together(lambda item: list(_climb(space, item[0], item[1], choose)), beam)
    choices = sorted([*choices, *(choice for climb in climbs for choice in climb)], key=lambda choice: choice.rank)
    if not choices[0].fits:
        least = min(choices, key=lambda c: c.plan.peak_bytes)
        raise UserError(
            f"nothing fits {spell_count(space.world, 'rank')} of {space.device}, the least is "
            f"{size(least.plan.peak_bytes)} of {size(planned_device(space.device).memory_bytes)} a rank; "
            "use more ranks, or LoRA"
        )
    return choices


def _fit(
    planned: Sequence[tuple[Start, Choice]],
    offloads: Sequence[Offload],
    begin: Callable[[Iterable[Start], Offload], list[Choice | UserError]],
) -> tuple[list[Choice], list[tuple[Start, Offload, Choice]]]:
    """All that was planned, and what fits of it, with as little on the host as does it.

    First with everything there: what does not fit then never does. What has more there is slower, so a start that is
    slower already than the few of its size of batch that go on is not followed.
    """
    choices = [first for _, first in planned]
    fitting = {i: (offloads[0], first) for i, first in enumerate(choices) if first.fits}
    tight = {i: first for i, first in enumerate(choices) if not first.fits}
    for offload in (*offloads[1:][-1:], *offloads[1:-1]):
        times: dict[int, list[float]] = {}
        for i, (_, choice) in fitting.items():
            times.setdefault(planned[i][0][0].tokens, []).append(choice.token_s)
        slowest = {tokens: sorted(some)[BEAM - 1] for tokens, some in times.items() if len(some) >= BEAM}
        followed = [i for i in tight if tight[i].token_s < slowest.get(planned[i][0][0].tokens, inf)]
        for i, found in zip(followed, begin([planned[i][0] for i in followed], offload), strict=True):
            if not isinstance(found, Choice):
                continue
            choices.append(found)
            if found.fits:
                fitting[i] = offload, found
            if found.fits != (offload == offloads[-1]):
                del tight[i]
            elif not found.fits:
                tight[i] = found
    return choices, [(planned[i][0], offload, choice) for i, (offload, choice) in fitting.items()]


def _climb(
    space: Space,
    start: Start,
    offload: Offload,
    choose: Callable[[Budget, Mapping[str, Any]], Choice | UserError],
) -> Iterator[Choice]:
    """Choices of a batch, a layout and what lies on the host, less and less of which is computed again."""
    budget, layout = start
    policies = space.policies(layout)

    def up(policy: int, offload: Offload) -> Iterator[tuple[int, Choice]]:
        """As long as it fits; with activations on the host, what keeps more may take less."""
        while policy >= 0:
            found = choose(budget, {**layout, **policies[policy], **_moved(offload)})
            if not isinstance(found, Choice):
                return
            yield policy, found
            if not found.fits and "activations" not in offload:
                return
            policy -= 1

    policy = len(policies) - 1
    for place, found in up(policy - 1, offload):
        yield found
        policy = place if found.fits else policy
    with_activations = tuple(dict.fromkeys(("activations", *offload)))
    if policy > 0 and offload != with_activations and set(with_activations) in map(set, space.offloads()):
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

    def plan(self, config: Config, device_name: str, micro_batches: int | None = None) -> Plan:
        """The plan of a config, with its own largest buckets, on a device. Raises ValueError where there is none.

        `micro_batches`: of a step; None: as the config says (`workload.largest_workload`).
        """
        names = {"layout", "data", "lora", "freeze", "optimizer", "objective"}
        sections = config.model_dump(mode="json", include=names)
        model = [config.model.path, config.model.dtype, config.model.table, config.train.compile]
        key = json.dumps([*model, sections, micro_batches])
        if key not in self._known:
            self._known[key] = measure_config(_request(config, device_name, self._sample_tokens, micro_batches))
        return self._known[key].on(planned_device(device_name))


@contextmanager
def planner(device_name: str, jobs: int, sample_tokens: int) -> Iterator[tuple[Planner, Together]]:
    """A planner for one device, each config with its own largest buckets, and a map that keeps its processes busy.

    With one job it is this process.
    """
    if jobs == 1:
        measures = Measures(sample_tokens)

        def measured(config: Config, micro_batches: int | None) -> Plan:
            return measures.plan(config, device_name, micro_batches)

        yield _with_room_for_two(measured), map
        return
    with ThreadPoolExecutor(2 * jobs, thread_name_prefix="mmfn-suggest") as threads, planners(jobs) as submit:

        def plan(config: Config, micro_batches: int | None) -> Plan:
            found = submit(_request(config, device_name, sample_tokens, micro_batches)).result()
            if isinstance(found, str):
                raise UserError(found)
            return found

        yield _with_room_for_two(plan), threads.map


def _request(config: Config, device_name: str, sample_tokens: int, micro_batches: int | None) -> Request:
    request = run_request(config, device_name, sample_tokens=sample_tokens)
    if micro_batches is None:
        return request
    return replace(request, workload=replace(request.workload, micro_batches=micro_batches))


def _with_room_for_two(plan: Planner) -> Planner:
    """The same, but a step that counts samples has memory for two micro-batches: where most steps have one, one of
    longer samples may not."""

    def planned(config: Config, micro_batches: int | None) -> Plan:
        if micro_batches != 1:
            return plan(config, micro_batches)
        one = plan(config, 1)
        return replace(plan(config, 2), time=one.time, tokens=one.tokens)

    return planned
