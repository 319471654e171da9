"""`mmfn suggest`: a config for a model, a data set and so many ranks: batches, layout and what saves memory."""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmfn.batch import Sample
from mmfn.errors import UserError
from mmfn.train.build.data import open_dataset
from mmfn.train.build.model import find_family
from mmfn.train.build.processor import load_model_processor
from mmfn.train.config.load import Settings, load_section
from mmfn.train.config.schema import DataSection, ModelSection
from mmfn.train.data import Dataset
from mmfn.train.planning.choice import Budget, Choice, Space
from mmfn.train.planning.config_text import config_text
from mmfn.train.planning.device_file import planned_device
from mmfn.train.planning.suggest import planner, suggest
from mmfn.train.run.folder import check_file, write_text
from mmfn.train.survey.counts import total
from mmfn.train.survey.fill import BUDGETS, FITTING, plan_batches
from mmfn.train.survey.given_batches import grown, limits_of, plan_within
from mmfn.train.survey.survey import Survey, survey
from mmfn.train.survey.text import tower_sizes

EPOCH_STEPS = 50  # steps that an epoch should have: a batch of many ranks may be larger than the data suits
MOST_BUDGETS = 4  # sizes of batches that are planned
COMMAND = "mmfn suggest"  # what the head of a config begins with
LORA = {"rank": 16, "alpha": 32}


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn suggest MODEL DATA --device NAME --world N`: print the config, or write it with --out."""
    planned_device(args.device)
    if args.world < 1 or args.rows < 1:
        raise UserError(f"--world {args.world} and --rows {args.rows} must be positive; raise them")
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be positive; raise it")
    given = Settings(values=_usual(args), path=Path("(options)"), origins={}).overridden(args.overrides)
    if args.out is not None:
        check_file("--out", args.out, f"# {COMMAND} ")
    seen, num_rows = _survey(args, given)
    budgets = budgets_of(seen, num_rows, args.world)
    jobs = args.jobs or os.cpu_count() or 1
    with planner(args.device, jobs, typical_tokens(seen)) as (plan, together):
        space = Space(settings=given, world=args.world, device=args.device, budgets=budgets)
        choices = [choice for choice in suggest(space, plan, together, say) if choice.fits]
    assumed = _assumed(seen, choices[0])
    say(assumed)
    say("\n".join([f"best: {choices[0]}", *(f"next: {choice}" for choice in choices[1:4])]))
    name = args.out or "suggested.yaml"
    text = config_text([*_head(args, choices[0].fill), assumed], choices[0], name)
    if args.out is None:
        say(f"\n{text.rstrip()}")
    else:
        write_text(Path(args.out), text)
        say(f"wrote {args.out}; look at it with mmfn check {args.out}")


@dataclass(frozen=True)
class Spread:
    """Some rows of a data set, as far from each other as they can be."""

    dataset: Dataset
    num: int

    def __len__(self) -> int:
        return min(self.num, len(self.dataset))

    def measure(self, index: int) -> Sample:
        """See `survey.Measurable`."""
        return self.dataset.measure(self._row(index))

    def place(self, index: int) -> str:
        """See `survey.Measurable`."""
        return self.dataset.place(self._row(index))

    def _row(self, index: int) -> int:
        return index * len(self.dataset) // len(self)


def budgets_of(seen: Survey, num_rows: int, world: int) -> list[Budget]:
    """Sizes of batches that nearly all samples fit, the smallest first; those under which an epoch is too few steps are
    left out, but for the smallest. Raises ValueError for data without a sample."""
    fitting = [fill for fill in seen.fills if fill.batches and fill.fitting >= FITTING]
    fitting = fitting or [fill for fill in seen.fills if fill.batches][-1:]
    if not fitting:
        raise UserError("the data has no sample that can be used; see mmfn data check")
    tokens = mean_tokens(seen) * num_rows
    suiting = [fill for fill in fitting if fill.budget * world * EPOCH_STEPS <= tokens] or fitting[:1]
    return [
        Budget(
            tokens=fill.budget,
            towers=tower_sizes(fill, seen.inputs),
            fill=fill.share,
            sample_tokens=mean_tokens(seen),
        )
        for fill in suiting[-MOST_BUDGETS:]
    ]


def mean_tokens(seen: Survey) -> float:
    """Tokens of a row, those that are skipped counted as empty."""
    return total(seen.counts.tokens) / max(1, seen.counts.rows)


def typical_tokens(seen: Survey) -> int:
    """The length of which all samples would cost attention what they do: the sum of squares over the sum."""
    squares = sum(tokens * tokens * count for tokens, count in seen.counts.tokens.items())
    return max(1, round(squares / max(1, total(seen.counts.tokens))))


def samples_within(seen: Survey, longest: int | None) -> Survey:
    """A survey in which samples of more tokens than that are skipped."""
    if longest is None:
        return seen
    tokens = Counter({length: count for length, count in seen.counts.tokens.items() if length <= longest})
    return replace(seen, counts=replace(seen.counts, tokens=tokens))


def _usual(args: argparse.Namespace) -> dict[str, Mapping[str, Any]]:
    """What stands in a suggested config beside what is chosen."""
    name = Path(os.path.abspath(args.model)).name
    kind = planned_device(args.device).kind
    return {
        "model": {"path": args.model, "dtype": "float32" if kind == "cpu" else "bfloat16", "device": kind},
        "data": {"train": args.data},
        "optimizer": {"lr": 1e-4 if args.lora else 1e-5},
        **({"lora": LORA} if args.lora else {}),
        "train": {} if any(text.startswith("train.steps=") for text in args.overrides) else {"epochs": 1},
        "output": {"path": f"runs/{name}{'-lora' * args.lora}"},
    }


def _survey(args: argparse.Namespace, given: Settings) -> tuple[Survey, int]:
    """Lengths of rows of the data, without decoding where headers tell, and how many rows there are."""
    values = {"token_buckets": list(BUDGETS), "tower_buckets": {}, "workers": 2, "cache_mib": 0, **given.values["data"]}
    section: DataSection = load_section("data", values, ())
    model: ModelSection = load_section("model", given.values["model"], ())
    processor = load_model_processor(model.path, section.chat, section.media_settings)
    family, cfg = find_family(model)
    dataset = open_dataset(section, section.train, processor, section.max_samples)
    rows = Spread(dataset, args.rows)
    bucket = section.token_buckets[-1] if "token_buckets" in given.values["data"] else None
    towers = family.towers(cfg)
    limits, budgets = limits_of(section.tower_buckets, towers, longest=section.max_tokens, bucket=bucket)
    plan = plan_within(limits) if limits else plan_batches
    seen = survey(rows, family, cfg, plan, budgets=budgets, workers=section.workers)
    if budgets == BUDGETS and not limits:
        return seen, len(dataset)
    if seen.counts.tokens and not any(fill.batches for fill in seen.fills):
        names = [f"data.{n}" for n in ("token_buckets", "tower_buckets", "max_tokens") if n in given.values["data"]]
        raise UserError(f"no sample fits {', '.join(names)}; raise or remove what is too small (mmfn data check)")
    seen = samples_within(seen, section.max_tokens or bucket)
    is_free = not given.values["data"].keys() & {"token_buckets", "max_tokens"}
    times = len(dataset) / max(1, len(rows))
    fills = [
        fill if fill.budget in budgets else grown(fill, fill.budget if is_free else budgets[0], limits, times)
        for fill in seen.fills
    ]
    return replace(seen, fills=fills), len(dataset)


def _assumed(seen: Survey, choice: Choice) -> str:
    """What the plan of a choice takes for samples."""
    length = min(typical_tokens(seen), choice.config.data.token_buckets[-1])
    return (
        f"Planned with samples of {length:,} tokens each, whose attention costs as much as that of the data's; "
        "mmfn check and mmfn plan take another length, and say which."
    )


def _head(args: argparse.Namespace, fill: float) -> list[str]:
    lora = " --lora" if args.lora else ""
    return [
        f"{COMMAND} {args.model} {args.data} --device {args.device} --world {args.world}{lora}",
        f"Of the tokens of a batch {fill:.0%} are real.",
    ]
