"""How a run reports its progress: a bar on a terminal, otherwise one line of `key=value` pairs in a fixed order."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from tqdm import tqdm

from mmfn.console import print_line

TIMES = {"step_time": "step_s", "wait": "wait_s", "compute": "compute_s"}


def format_line(record: Mapping[str, Any], num_steps: int, terms: Sequence[str] = ()) -> str:
    """One grep-able line from a record of metrics.jsonl: always the same keys in the same order.

    `step=20/500 loss=1.5000 grad_norm=0.250 lr=1.00e-03 step_time=120.0ms wait=1.0ms compute=119.0ms tokens/s=8000
    tokens/s/device=1000 supervised=64 text=384 image=128 video=0 audio=0 padding=12.5% imbalance=1.03 mfu=41.2%
    memory=12.50GiB skipped_steps=0 skipped_samples=2 eta=1:01`, on one line. `imbalance`: the most that encoders of a
    rank compute, over the mean. Where no peak is known, TFLOP/s of a device in place of MFU. `terms`: metrics that make
    up the loss (`objective.loss_terms`), shown behind it: `loss=1.5000 ce=1.4000 aux_loss=1.0000`; then `eval_loss`,
    where the run was evaluated.
    """
    losses = " ".join(f"{name}={record[name]:.4f}" for name in ("loss", *terms, "eval_loss") if name in record)
    times = (f"{name}={1000 * record[key]:.1f}ms" for name, key in TIMES.items())
    kinds = (f"{kind}={record[f'{kind}_tokens']}" for kind in ("text", "image", "video", "audio"))
    used = f"mfu={100 * record['mfu']:.1f}%" if "mfu" in record else f"tflop/s={record['tflops_per_s']:.3g}"
    return (
        f"step={record['step']}/{num_steps} {losses} grad_norm={record['grad_norm']:.3f} lr={record['lr']:.2e} "
        f"{' '.join(times)} tokens/s={record['tokens_per_s']:.0f} "
        f"tokens/s/device={record['tokens_per_s_per_device']:.0f} supervised={record['supervised']} {' '.join(kinds)} "
        f"padding={100 * record['padding']:.1f}% imbalance={record['encoder_imbalance']:.2f} {used} "
        f"memory={record['memory_bytes'] / 2**30:.2f}GiB skipped_steps={record['skipped_steps']} "
        f"skipped_samples={record['skipped_samples']} eta={format_duration(record['eta_s'])}"
    )


def format_duration(seconds: float) -> str:
    """Minutes and seconds, with hours in front when there are any.

    >>> format_duration(61.4), format_duration(3700)
    ('1:01', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass
class Progress:
    """Shows records as they come. A context manager, so that the bar is closed when a step fails.

    `stream`: where to write; a terminal gets a bar, anything else a line every `log_every` steps, for the last one
    and for those behind which the run was evaluated.
    """

    num_steps: int
    log_every: int
    stream: TextIO

    def __enter__(self) -> "Progress":
        self.bar = None
        if self.stream.isatty():
            layout = "{percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            width, height = shutil.get_terminal_size((100, 24))  # some terminals say 0, and tqdm would draw nothing
            self.bar = tqdm(total=self.num_steps, file=self.stream, bar_format=layout, ncols=width, nrows=height)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, record: Mapping[str, Any], terms: Sequence[str] = ()) -> None:
        """Advance by one step; `terms` as in `format_line`."""
        step = record["step"]
        if self.bar is not None:
            text = f"loss={record['loss']:.4f} lr={record['lr']:.1e} {record['tokens_per_s']:.0f} tokens/s"
            self.bar.set_postfix_str(text, refresh=False)
            if self.bar.n == 0:  # a run that goes on begins here
                self.bar.n = self.bar.initial = step - 1
            self.bar.update()
        elif step % self.log_every == 0 or step == self.num_steps or "eval_loss" in record:
            self.say(format_line(record, self.num_steps, terms))

    def say(self, text: str) -> None:
        """Write one line without breaking the bar."""
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print_line(text, stream=self.stream)


def standard(num_steps: int, log_every: int) -> Progress:
    """Progress on standard output."""
    return Progress(num_steps=num_steps, log_every=log_every, stream=sys.stdout)
