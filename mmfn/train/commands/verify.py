"""`mmfn verify`: run a card's stages, compare with what it expects, and write it filled in."""

import argparse
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from mmfn.errors import UserError
from mmfn.train.evidence import stages
from mmfn.train.evidence.bench import Bench
from mmfn.train.evidence.card import EqualityStage, Stage, read_card
from mmfn.train.evidence.findings import BEGINNING, Findings, Line, lines_of
from mmfn.train.evidence.machine import machine, versions
from mmfn.train.run.folder import check_file, write_text


def run(args: argparse.Namespace, say: Callable[..., None]) -> None:
    """`mmfn verify`: run a card's stages, compare with what it expects, and write it filled in.

    Of several ranks (torchrun) all take part in the equality of layouts that are as many real ranks; nothing else is
    run, nor prepared. Raises ValueError behind it all where a figure is not what is expected.
    """
    card = read_card(args.card)
    bench = Bench(card=card, path=args.card, overrides=tuple(args.overrides), ranks=args.ranks, say=say)
    bench.load()  # an override that is wrong is said first
    todo = _select(bench, args.only)
    out = bench.root / "card.md" if args.out is None else Path(args.out)
    _check_out(out, is_default=args.out is None)
    if args.ranks.size == 1:
        bench.prepare()
    lines: list[Line] = []
    durations: dict[str, float] = {}
    for kind, stage in todo:
        layout = stage.name if isinstance(stage, EqualityStage) else ""
        say(f"{kind}{f' ({layout})' if layout else ''}")
        began = time.perf_counter()
        figures = lines_of(stage, kind, layout, stages.run(stage, bench))
        durations[kind] = round(durations.get(kind, 0.0) + time.perf_counter() - began, 1)
        for line in figures:
            say(f"  {line}")
        lines += figures
    findings = Findings(
        card=card,
        path=args.card,
        overrides=args.overrides,
        only=args.only,
        lines=lines,
        model=bench.model(),
        machine=machine(),
        versions=versions(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        durations_s=durations,
    )
    if args.ranks.index == 0:
        _write(findings, out, say)
        if findings.failures:
            first = findings.failures[0]
            others = f", and {len(findings.failures) - 1} more" if len(findings.failures) > 1 else ""
            raise UserError(
                f"{args.card}: {first.name} is {first.measured:.6g} but {first.expected} is expected{others}; see {out}"
            )


def _select(bench: Bench, only: list[str]) -> list[tuple[str, Stage]]:
    """(kind, stage) of all that is to be run."""
    if unknown := [name for name in only if name not in bench.card.stages]:
        known = ", ".join(bench.card.stages)
        raise UserError(f"--only {unknown[0]} but {bench.path} has no such stage; it has {known}")
    every = [(kind, one) for kind, several in bench.card.stages.items() for one in several]
    selection = [(kind, stage) for kind, stage in every if not only or kind in only]
    if bench.ranks.size == 1:
        return selection
    worlds = {stage.name: bench.load(*stage.settings).config.layout.sizes.world for stage in bench.card.equality}

    def is_real(stage: Stage) -> bool:
        return (
            isinstance(stage, EqualityStage) and stage.ranks == "processes" and worlds[stage.name] == bench.ranks.size
        )

    real = [(kind, stage) for kind, stage in selection if is_real(stage)]
    if not real:
        raise UserError(
            f"{bench.path} has no equality of a layout of {bench.ranks.size} ranks that are processes; start mmfn "
            "verify without torchrun, and it starts what it needs"
        )
    return real


def _check_out(out: Path, *, is_default: bool) -> None:
    if out.suffix != ".md":
        raise UserError(f"--out {str(out)!r} must end in .md; its values go to the same name with .yaml")
    if not is_default and not out.parent.is_dir():
        raise UserError(f"--out {str(out)!r} lies in a folder that does not exist; make the folder first")
    if not is_default:
        values = out.with_suffix(".yaml")
        check_file("--out", str(values), BEGINNING)
        if os.path.lexists(out) and not values.exists():
            raise UserError(f"--out {str(out)!r} is there and was not written by this command; choose another file")


def _write(findings: Findings, out: Path, say: Callable[..., None]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out.with_suffix(".yaml"), findings.to_yaml())
    write_text(out, findings.to_markdown())
    checked = [line for line in findings.lines if line.passed is not None]
    say(f"{len(checked) - len(findings.failures)} of {len(checked)} figures are as expected")
    say(f"card: {out}, and {out.with_suffix('.yaml').name} for programs")
