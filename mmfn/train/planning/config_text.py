"""A chosen config as the text of a file: what is expected of it in its head, and what is set, nothing else."""

import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from mmfn.parallel.planning.plan import size
from mmfn.train.planning.choice import Choice
from mmfn.train.planning.device_file import planned_device


def config_text(head: Sequence[str], choice: Choice, name: str) -> str:
    """The file `name`, whose comment begins with the lines of `head`."""
    lines = [f"# {line}" for line in (*head, *expectation(choice), f"Start: {start_command(choice, name)}")]
    for section, values in choice.config.model_dump(mode="json", exclude_defaults=True).items():
        lines += ["", f"{section}:", *(f"  {key}: {_inline(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def expectation(choice: Choice) -> list[str]:
    """What a plan predicts, in the words of the head of a config."""
    plan, t = choice.plan, choice.plan.time
    host = f", {size(plan.host_bytes)} on the host" if plan.host_bytes else ""
    rate = choice.config.layout.world / choice.token_s
    return [
        f"Expected of a rank: {size(plan.peak_bytes)} of {size(plan.memory_bytes)}{host}; a step of "
        f"{t.total_s:.3g} s, {rate:,.0f} tokens/s in all, HFU {t.hfu:.0%} (mmfn plan says how)."
    ]


def start_command(choice: Choice, name: str) -> str:
    """What starts the run."""
    world, most = choice.config.layout.world, planned_device(choice.plan.device).ranks_per_node
    if world == 1:
        return f"mmfn train {shlex.quote(name)}"
    nodes = f"--nnodes {world // most} " if world > most else ""
    return f"torchrun {nodes}--nproc-per-node {min(world, most)} -m mmfn train {shlex.quote(name)}"


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
