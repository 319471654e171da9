"""Settings of a run that are others than those it was saved with, and which of them make going on meaningless."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmfn.errors import UserError
from mmfn.train.config.load import Loaded, describe

# Sections that decide what is trained and how. Within them, what decides no number is left out.
DECISIVE = ("model", "data", "objective", "optimizer", "schedule", "freeze", "lora", "train", "layout")
FREE = (
    "data.check", "data.workers", "data.worker_kind", "data.ahead", "data.cache_mib", "data.index_folder",
    "train.allocator", "train.log_every", "layout.timeout_s",
)  # fmt: skip
WHERE = ("output.path", "output.overwrite")


@dataclass(frozen=True, kw_only=True)
class Change:
    """A dotted setting, what it was and what it is."""

    setting: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.setting} {_shown(self.before)} -> {_shown(self.now)}"


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """A setting that cannot change within a run.

    `is_optimizer`: only where the optimizer's state goes on. `is_switch`: only from null to a value, or back.
    """

    setting: str
    reason: str
    is_optimizer: bool = False
    is_switch: bool = False

    def forbids(self, change: Change) -> bool:
        """Whether the change is one that makes going on meaningless."""
        return not self.is_switch or (change.before is None) != (change.now is None)


FIXED = (
    Fixed(setting="model.dtype", reason="the parameters were saved in it"),
    Fixed(setting="lora.rank", reason="it is the shape of the adapters"),
    Fixed(setting="lora.targets", reason="it decides which adapters there are"),
    Fixed(setting="optimizer.kind", reason="the state of one optimizer means nothing to another", is_optimizer=True),
    Fixed(setting="optimizer.master", reason="the float32 copies are part of the state", is_optimizer=True),
    Fixed(setting="optimizer.moments_dtype", reason="the moments were saved in it", is_optimizer=True),
    Fixed(setting="freeze.parts", reason="the optimizer has a state of what is trained alone", is_optimizer=True),
    Fixed(setting="freeze.patterns", reason="the optimizer has a state of what is trained alone", is_optimizer=True),
    Fixed(setting="lora.keep", reason="the optimizer has a state of what is trained alone", is_optimizer=True),
    Fixed(setting="optimizer.clip_norm", reason="clipping has a place in the state", is_optimizer=True, is_switch=True),
    Fixed(setting="optimizer.ema_decay", reason="averages are part of the state", is_optimizer=True, is_switch=True),
    Fixed(setting="train.spike_window", reason="the norms of so many steps are part of the state", is_optimizer=True),
)
"""What is refused of a run that goes on. Data and their order are compared by what was read, not by their settings."""


def changes(text: str, loaded: Loaded, *, is_whole: bool = False) -> list[Change]:
    """How settings differ from those in `text`, which `describe` wrote, maybe that of another version of mmfn.

    Those that decide numbers; `is_whole`: all but where the run lies and how it is saved. A setting that one of the two
    does not know is none.
    """
    before, now = _flat(text), _flat(describe(loaded))

    def counts(setting: str) -> bool:
        section = setting.partition(".")[0]
        if setting in FREE:
            return False
        if is_whole:
            return section != "checkpoint" and setting not in WHERE
        return section in DECISIVE and setting != "data.eval"

    pairs = [(setting, before[setting], now[setting]) for setting in now if setting in before and counts(setting)]
    return [Change(setting=setting, before=old, now=new) for setting, old, new in pairs if old != new]


def refuse(changed: Sequence[Change], folder: Path, *, has_optimizer: bool) -> None:
    """Raise ValueError for a change that makes going on from the checkpoint in `folder` meaningless."""
    fixed = {rule.setting: rule for rule in FIXED if has_optimizer or not rule.is_optimizer}
    for change in changed:
        if (rule := fixed.get(change.setting)) is not None and rule.forbids(change):
            other = ", or begin another run from it with checkpoint.load_optimizer=false" if rule.is_optimizer else ""
            raise UserError(
                f"{folder} cannot be resumed from: {change.setting} was {_shown(change.before)} and now is "
                f"{_shown(change.now)}, but {rule.reason}; set it back{other}"
            )


def _flat(text: str) -> dict[str, Any]:
    sections = yaml.safe_load(text) or {}
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def _shown(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).removesuffix("\n")
    text = text.removesuffix("\n...")
    return text if len(text) <= 60 else f"{text[:57]}..."
