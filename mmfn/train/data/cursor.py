"""`Cursor`: where a run is in the order of data, a few integers.

Places count the samples of all epochs, one behind the other. What is at one is a pure function of (seed, place), in no
memory and no time that grows with the data, so that going on from a cursor costs the same wherever it is.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from mmfn.errors import UserError

State = dict[str, int | str]
COUNTS = ("step", "place", "window_step", "seen", "bad")


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a run is: behind `step` steps, at step `window_step` of the window that begins at `place`.

    `seen` and `bad`: samples so far, and how many of them were skipped.
    """

    step: int = 0
    place: int = 0
    window_step: int = 0
    seen: int = 0
    bad: int = 0


START = Cursor()


def digest_of(value: object) -> str:
    """A few letters that tell plain values apart: numbers and texts, and tuples, lists and dicts of them."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def to_state(cursor: Cursor, fingerprint: Mapping[str, int | str]) -> State:
    """A cursor bound to what its meaning depends on: integers and strings, for a checkpoint."""
    return {**asdict(cursor), **fingerprint}


def from_state(state: Mapping[str, int | str], fingerprint: Mapping[str, int | str]) -> Cursor:
    """The cursor of `to_state`. Raises ValueError unless it is one of the same data in the same order."""
    if absent := sorted({*COUNTS, *fingerprint} - state.keys()):
        raise UserError(f"the cursor lacks {absent[0]!r}; resume from one that this version of mmfn has saved")
    for name, value in fingerprint.items():
        if state[name] != value:
            raise UserError(
                f"the cursor is of a run with {name} {state[name]!r} but this one has {value!r}; resume with the same "
                "data and settings, or begin another run from it with checkpoint.load_cursor=false"
            )
    counts = {name: state[name] for name in COUNTS}
    if odd := [name for name, count in counts.items() if type(count) is not int or count < 0]:
        raise UserError(f"{odd[0]} of the cursor is {counts[odd[0]]!r} but must count from 0; the file is damaged")
    return Cursor(**counts)  # type: ignore[arg-type]  # just checked
