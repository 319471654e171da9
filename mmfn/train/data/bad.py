"""The error of one sample that cannot be used, while the others of its data set can."""

from mmfn.errors import UserError
from mmfn.train.data.entries import show


class BadSample(UserError):  # noqa: N818
    """What makes one sample unusable: no JSON, broken media, too many tokens. A function of the data alone.

    `id`: of the sample, or its number where it has none. `place`: where it is stored, "'train.jsonl', line 17".
    `reason`: one sentence with the fix.
    """

    def __init__(self, id: str, place: str, reason: str) -> None:
        super().__init__(f"sample {show(id)} of {place}: {reason}")
        self.id, self.place, self.reason = id, place, reason

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str, str]]:
        """Errors are pickled between processes by their arguments."""
        return type(self), (self.id, self.place, self.reason)
