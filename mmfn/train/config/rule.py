"""What a rule between settings is: a row (settings, condition, sentence) and three ways to write one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from mmfn.errors import UserError
from mmfn.train.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack of a model's blocks."""

    depth: int
    has_experts: bool


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What rules are about. `stacks` and `towers` of the model by name: None while only the config is known.

    `num_ahead`: further tokens that it predicts. `hears`: whether a tower reads sound. `is_recurrent`: whether layers
    carry a state from token to token. `is_plan`: nothing is run, so that neither data nor device matter.
    """

    config: Config
    stacks: Mapping[str, Stack] | None = None
    towers: tuple[str, ...] | None = None
    num_ahead: int | None = None
    hears: bool | None = None
    is_recurrent: bool | None = None
    is_plan: bool = False

    @property
    def has_experts(self) -> bool:
        """Whether the model may have experts."""
        return self.stacks is None or any(stack.has_experts for stack in self.stacks.values())


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row. `find`: a sentence for every breach. `warns`: a breach is said and the run goes on.

    `idles`: a sentence that begins with a setting says that this one has no effect, by the config alone.
    """

    settings: tuple[str, ...]
    find: Callable[[Subject], Iterator[str]]
    warns: bool = False
    idles: bool = False


@dataclass(frozen=True, kw_only=True)
class Breach:
    """A rule that a config breaks, and how. `setting`: the first one it is about. `is_idle`: it has no effect."""

    setting: str
    sentence: str
    warns: bool
    is_idle: bool = False


def idle(setting: str, condition: Callable[[Config], bool], reason: str, *, warns: bool = False) -> Rule:
    """`setting` has no effect where `condition` holds. `reason` is a template over the config `c`."""

    def find(subject: Subject) -> Iterator[str]:
        c = subject.config
        if c.is_changed(setting) and condition(c):
            yield f"{setting} has no effect {reason.format(c=c)}; remove it or change that"

    return Rule(settings=(setting,), find=find, warns=warns, idles=True)


def refused(
    settings: str, condition: Callable[[Config], bool], sentence: str, *, runs: bool = False, idles: bool = False
) -> Rule:
    """Settings (divided by spaces) that do not go together where `condition` holds. `sentence`: a template over `c`.

    `runs`: a plan may have them. `idles`: as of `Rule`.
    """

    def find(subject: Subject) -> Iterator[str]:
        if condition(subject.config) and not (runs and subject.is_plan):
            yield sentence.format(c=subject.config)

    return Rule(settings=tuple(settings.split()), find=find, idles=idles)


def asked(settings: str, check: Callable[[Config], object]) -> Rule:
    """What `check` says that is given the config, behind the settings it is about: it raises a ValueError."""

    def find(subject: Subject) -> Iterator[str]:
        try:
            check(subject.config)
        except UserError as error:
            yield f"{', '.join(settings.split())}: {error}"

    return Rule(settings=tuple(settings.split()), find=find)
