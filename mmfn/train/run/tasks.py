"""What is done behind some steps besides saving: held-out loss, answers to fixed prompts, exports, a profile."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from mmfn.parallel.mesh.host_values import gather_values
from mmfn.parallel.weights.host_memory import complete
from mmfn.train.build.forward import build_forward
from mmfn.train.build.run import Run
from mmfn.train.checkpoint.format import folder_name
from mmfn.train.data import encode_sample
from mmfn.train.data.cursor import Cursor
from mmfn.train.forward import Forward
from mmfn.train.generate import generate
from mmfn.train.optim import ema_params
from mmfn.train.run.answer import text_of
from mmfn.train.run.folder import ANSWERS, EXPORTS
from mmfn.train.run.held_out import LossSums, held_out_loss
from mmfn.train.run.loop import HELD_OUT, Task
from mmfn.train.run.profile import Profile
from mmfn.train.run.save import save_trained
from mmfn.train.step import State
from mmfn.train.watch import Watch


class _Unwanted(Exception):  # noqa: N818  # it is no error
    """On all ranks: one of them was asked to stop."""


def tasks_of(run: Run, folder: Path, start: Cursor, watch: Watch) -> list[Task]:
    """What a config says is done behind some steps, besides saving."""
    config, tasks = run.loaded.config, list[Task]()
    if config.eval.every is not None:
        tasks.append(HeldOut(run=run, watch=watch, folder=folder, every=config.eval.every))
    if config.output.export_every is not None:
        tasks.append(Exporter(run=run, watch=watch, folder=folder, every=config.output.export_every))
    if config.train.profile is not None:
        rank = run.place.host["world"].index
        tasks.append(Profile(config.train.profile, folder, rank, run.place.device, start.step))
    return tasks


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """A task of `loop.train`: what is trained so far, as it is saved at the end, in a folder of the step."""

    run: Run
    watch: Watch
    folder: Path
    every: int

    def is_due(self, step: int) -> bool:
        """Every so many steps, but not behind the last one."""
        return step % self.every == 0 and step < self.run.loaded.config.train.num_steps

    def __call__(self, state: State, cursor: Cursor) -> dict[str, float]:
        """Nothing is said of it in the step's record."""
        self.watch.enter("export")
        complete(self.run.place.device)  # copies to the host may be under way (`on_host`)
        is_average = self.run.loaded.config.output.weights == "ema"
        params = ema_params(state) if is_average else state["params"]
        save_trained(self.run, params, self.folder / EXPORTS / folder_name(cursor.step))
        return {}


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A task of `loop.train`: the loss of all held-out samples, by data set and by what they are made of.

    It is computed on the shards, by all ranks together. A run that is asked to stop meanwhile gives it up.
    """

    run: Run
    watch: Watch
    folder: Path
    every: int

    def is_due(self, step: int) -> bool:
        """Every so many steps."""
        return step % self.every == 0

    def __call__(self, state: State, cursor: Cursor) -> dict[str, float]:
        """`eval_loss` and `eval_loss/SET/MODALITY`, means over supervised tokens: part of the step's record."""
        run, config = self.run, self.run.loaded.config
        assert run.held_out is not None, "a rule asks for data.eval"
        self.watch.enter("evaluation")
        forward = build_forward(config, replace(run.model, params=state["params"]), run.place, run.specs)
        try:
            sums = held_out_loss(forward, run.held_out, batch_samples=config.eval.batch_samples, on_batch=self._go_on)
        except _Unwanted:
            return {}
        self._answer(forward, cursor.step)
        return means_of(sums)

    def _go_on(self) -> None:
        """Behind every batch, on all ranks. Raises on all of them where any is asked to stop."""
        self.watch.enter("evaluation")
        if any(gather_values(self.watch.is_stopping, self.run.place.host["world"], "asked")):
            raise _Unwanted

    def _answer(self, forward: Forward, step: int) -> None:
        """The first rank's answers to the prompts, while the others take part in what it computes."""
        run, section = self.run, self.run.loaded.config.eval
        if not section.prompts:
            return
        messages = [[{"role": "user", "content": prompt}] for prompt in section.prompts if run.place.is_first]
        prompts = [encode_sample(turns, run.processor, {}, is_prompt=True, id="prompt") for turns in messages]
        rows = generate(
            forward,
            forward.pack(prompts),
            section.max_new_tokens,
            eos_token_ids=run.eos_token_ids,
            is_idle=not prompts,
            check_finite=False,
        )
        if not run.place.is_first:
            return
        with open(self.folder / ANSWERS, "a", encoding="utf-8") as file:
            for prompt, row in zip(section.prompts, rows, strict=True):
                answer = text_of(row, run.processor.chat.tokenizer, run.eos_token_ids)
                file.write(json.dumps({"step": step, "prompt": prompt, "answer": answer}) + "\n")


def means_of(sums: LossSums) -> dict[str, float]:
    """The mean of all, and of each key, of those with a supervised token.

    >>> means_of({"a.json/image": (6.0, 2), "a.json/text": (2.0, 2)})
    {'eval_loss': 2.0, 'eval_loss/a.json/image': 3.0, 'eval_loss/a.json/text': 1.0}
    """
    total = sum(value for value, _ in sums.values()), sum(number for _, number in sums.values())
    named = {HELD_OUT: total, **{f"{HELD_OUT}/{key}": pair for key, pair in sums.items()}}
    return {name: value / number for name, (value, number) in named.items() if number}
