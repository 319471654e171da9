"""What a training run left behind, and whether it is of use."""

from dataclasses import dataclass
from pathlib import Path

from mmfn.errors import UserError
from mmfn.model import Model
from mmfn.train.run.evaluate import Evaluation
from mmfn.train.run.record import StepRecord, is_finite


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left behind. `train_s`: time of its steps, without preparation and evaluation.

    `model`: with this rank's shards, of one process with whole parameters. `saved`: where the trained parameters are,
    by kind: "checkpoint", "adapter". `num_resumed`: how many of the `records` are of steps before the run went on.
    """

    folder: Path
    saved: dict[str, Path]
    model: Model
    records: list[StepRecord]
    evaluation: Evaluation | None
    train_s: float
    num_resumed: int = 0

    def check_usable(self) -> None:
        """Raise ValueError for a run that is complete but of no use.

        A step that was taken was finite, and one that was skipped left the parameters as they were, so a few that are
        not finite at the end say nothing about them: it takes more of those than steps that were taken before.
        """
        fix = f"lower optimizer.lr or check weights and data (the run is in {str(self.folder)!r})"
        last, num_taken = self.records[-1], sum(not record["skipped"] for record in self.records)
        if num_taken == 0:
            raise UserError(f"all {len(self.records)} steps were skipped, their loss or gradients not finite; {fix}")
        if last["in_a_row"] > num_taken and not is_finite(last):
            raise UserError(
                f"the training diverged, the loss of the last step is {last['loss']:.4g} and its gradient norm "
                f"{last['grad_norm']:.4g}, and {num_taken} of {len(self.records)} steps were taken; {fix}"
            )
        if self.evaluation is not None:
            self.evaluation.check_finite()
