"""What a training run left behind, and whether it is of use."""

from dataclasses import dataclass
from pathlib import Path

from mmfn.errors import UserError
from mmfn.model import Model
from mmfn.parallel.mesh.axis import Axis
from mmfn.parallel.mesh.host_values import gather_values
from mmfn.train.report.log import RunLog
from mmfn.train.run.evaluate import Evaluation
from mmfn.train.run.record import Tally, is_finite


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left behind. `train_s`: time of its steps, without preparation and evaluation.

    `model`: with this rank's shards, of one process with whole parameters. `saved`: where the trained parameters are,
    by kind: "checkpoint", "adapter". `tally`: of its steps, whose records are in its metrics.jsonl.
    """

    folder: Path
    saved: dict[str, Path]
    model: Model
    tally: Tally
    evaluation: Evaluation | None
    train_s: float

    def check_usable(self, log: RunLog | None, world: Axis) -> None:
        """Raise ValueError on all ranks, which all call it, for a run that is complete but of no use.

        `log`: what the first rank has read of the run's steps.
        """
        if fault := gather_values("" if log is None else self._fault(log), world, "results")[0]:
            raise UserError(fault)
        if self.evaluation is not None:
            self.evaluation.check_finite()

    def _fault(self, log: RunLog) -> str:
        """What makes steps useless, "" where nothing does.

        A step that was taken was finite, and one that was skipped left the parameters as they were, so a few that are
        not finite at the end say nothing about them: it takes more of those than steps that were taken before.
        """
        fix = f"lower optimizer.lr or check weights and data (the run is in {str(self.folder)!r})"
        last, num_taken = self.tally.last[-1], log.num_steps - log.sums["skipped"]
        if num_taken == 0:
            return f"all {log.num_steps} steps were skipped, their loss or gradients not finite; {fix}"
        if last["in_a_row"] > num_taken and not is_finite(last):
            return (
                f"the training diverged, the loss of the last step is {last['loss']:.4g} and its gradient norm "
                f"{last['grad_norm']:.4g}, and {num_taken} of {log.num_steps} steps were taken; {fix}"
            )
        return ""
