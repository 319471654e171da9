"""Draws which mechanism works for which family into docs/support.md, from the tests that prove it: `make support`.

A family joins with its lines in `mmfn.models.FAMILIES` and `tests.tiny.TINY`, a mechanism with its row in `ROWS`. A
test counts for a family if its id has the family's model_type, the name of a tiny model of it or of a published size.
A cell without a test is refused, unless the family has no use for the mechanism (`NEEDS`) or `REASONS` says why.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfn.models import FAMILIES, Family, family
from mmfn.parallel.context.token_order import CP_KINDS, PIECE_KINDS
from mmfn.spec import has_experts
from mmfn.train.objective import OBJECTIVES
from tests import tiny

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"

PARITY, ALL = "models/test_parity.py", "models/test_families.py"
PUBLISHED = "models/test_published.py"
GENERATE, EVERY = "train/test_generate.py", "train/test_every_family.py"
CELL, COMPILED = "parallel/test_conformance.py::test_cell", "parallel/test_conformance.py::test_compiled_cell"
LAYOUT = "parallel/test_layouts.py::test_a_step_of_a_model"
FORMULA = f"{EVERY}::test_two_steps_are_those_of_the_written_formula"
OPTIMIZER = f"{EVERY}::test_every_optimizer_writes_what_its_formula_says"


@dataclass(frozen=True)
class Row:
    """A mechanism and the test of it: a file below `tests/` and a function in it. `cases`: a regex over its ids."""

    mechanism: str
    test: str
    cases: str = ""
    needs: str = ""


ROWS: dict[str, tuple[Row, ...]] = {
    "The model": (
        Row(
            "logits, loss, gradients of transformers, float64",
            f"{PARITY}::test_everything_equals_transformers_in_float64",
        ),
        Row(
            "logits, loss, gradients of transformers, float32",
            f"{PARITY}::test_everything_equals_transformers_in_float32",
        ),
        Row("bfloat16 as in transformers", f"{ALL}::test_bfloat16_follows_transformers"),
        Row("packed rows", f"{ALL}::test_packed_equals_separate_rows"),
        Row(
            "names of the published sizes", f"{PUBLISHED}::test_every_name_and_shape_of_the_published_file_and_no_other"
        ),
        Row("counts of the published sizes", f"{PUBLISHED}::test_the_count_is_the_published_one_to_the_last_digit"),
        Row("export, bit by bit", f"{EVERY}::test_what_is_exported_comes_back_bit_by_bit"),
        Row("generation with a cache", f"{GENERATE}::test_cached_steps_equal_the_whole_sequence"),
        Row("generated ids of transformers", f"{GENERATE}::test_ids_equal_transformers"),
    ),
    "The loss and the update": (
        *(Row(f"`{name}`", FORMULA, rf"-{name}$") for name in OBJECTIVES),
        Row("loss in chunks", f"{EVERY}::test_chunks_of_the_loss_are_those_of_whole_logits"),
        Row("multi-token prediction", FORMULA, needs="ahead"),
        Row("balance of routers", FORMULA, needs="losses"),
        *(Row(f"optimizer {name}", OPTIMIZER, rf"-{name}$") for name in ("sgd", "muon", "ema")),
        Row("AdamW, by path", OPTIMIZER, "-rules$"),
        Row("leaves that a rule updates", FORMULA, needs="rules"),
    ),
    "What is trained": (
        Row("frozen parts", "train/test_freeze.py::test_a_frozen_part"),
        Row("LoRA, merged", "test_lora.py::test_a_model_computes_what_the_merged_one_does"),
        Row("LoRA, in peft", "interop/test_adapter.py::test_peft_loads_the_adapters_of_every_family"),
        Row("LoRA on a mesh", LAYOUT, "trained lora"),
        Row("LoRA with dropout", CELL, ", dropout, "),
        Row("frozen parts on a mesh", LAYOUT, "trained (decoder|second block)"),
    ),
    "Layouts": (
        Row("data parallel, sharded", CELL, r", dp \d, fsdp, "),
        Row("data parallel, replicated", CELL, r", replicate 2, fsdp, "),
        Row("HSDP", CELL, r", replicate 2, dp \d, fsdp, "),
        Row("ranks without media or labels", CELL, ", asymmetric, first half"),
        *(
            Row(f"context parallel, {kind}", LAYOUT, rf"\b{kind}\b", "" if kind in PIECE_KINDS else "pieces")
            for kind in CP_KINDS
        ),
        Row("expert parallel", LAYOUT, r"\bep \d", needs="experts"),
        Row("expert and context parallel", LAYOUT, r"\bcp \d.*\bep \d", needs="experts"),
        Row("sharded head", LAYOUT, "head sharded"),
        Row("processes", f"{EVERY}::test_two_processes_take_the_step_of_one"),
    ),
    "Memory and speed": (
        Row("remat, full", CELL, ", remat, "),
        Row("remat, every second block", CELL, ", remat every 2, "),
        Row("remat, selective", CELL, ", selective, "),
        Row("remat, uniform", CELL, ", uniform, mixed"),
        Row("remat, block", CELL, ", block, "),
        Row("remat by stack", CELL, ", by stack, "),
        Row("offload of activations", CELL, ", offload, mixed"),
        Row("offload of parameters", CELL, ", hosted, mixed"),
        Row("offload of the optimizer", f"{EVERY}::test_an_optimizer_on_the_host_gives_the_same_step"),
        Row("another dtype to compute in", CELL, ", float32, "),
        Row("another dtype to sum in", CELL, ", wide sums, "),
        Row("compiled by layer", COMPILED, ", layer, mixed"),
        Row("compiled whole", COMPILED, ", step, mixed"),
        Row("plan of a step, to the byte", f"{EVERY}::test_a_plan_counts_what_the_step_does"),
        Row(
            "plan of a mesh's collectives", "parallel/test_plan.py::test_planned_collectives_are_those_of_virtual_ranks"
        ),
    ),
}


NEEDS: dict[str, tuple[Callable[[Family, Any], Any], str]] = {  # of a tiny model, and what a cell says without it
    "experts": (lambda model, cfg: has_experts(model.specs(cfg)), "no experts"),
    "pieces": (lambda model, cfg: not model.is_recurrent(cfg), "refused: no state passes through cut segments"),
    "ahead": (lambda model, cfg: model.num_ahead(cfg), "no layer for it"),
    "losses": (lambda model, cfg: model.loss_weights(cfg), "no routers"),
    "rules": (lambda model, cfg: model.rules(cfg), "no such leaf"),
}
REASONS: dict[tuple[str, str], str] = {}
"""(mechanism, model_type) -> why no test proves it, in a few words."""


def names() -> dict[str, list[str]]:
    """model_type -> what ids of tests call it: its tiny models, itself, its published sizes."""
    files = sorted((ROOT / "configs" / "models").glob("*/config.json"))
    types = {file.parent.name: json.loads(file.read_text(encoding="utf-8"))["model_type"] for file in files}
    return {
        model_type: [
            *(name for name in tiny.TINY if tiny.family_of(name).name == model_type),
            family(model_type).name,
            *(size for size, of in types.items() if of == model_type),
        ]
        for model_type in FAMILIES
    }


def collect(rows: Sequence[Row]) -> dict[str, list[str]]:
    """test -> the parts of its ids in brackets, of all that pytest collects."""
    files = sorted({f"tests/{row.test.partition('::')[0]}" for row in rows})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError(f"pytest collects nothing:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    ids: dict[str, list[str]] = {}
    for line in result.stdout.splitlines():
        if line.startswith("tests/"):
            test, _, case = line.removeprefix("tests/").partition("[")
            ids.setdefault(test, []).append(case.removesuffix("]"))
    return ids


def cell(row: Row, model_type: str, aliases: Sequence[str], cases: Sequence[str]) -> str:
    """A link to the test of a mechanism for a family, or why there is none.

    `aliases`: what ids call the family, `cases`: those of the row's test. Raises ValueError without test and reason,
    and with both.
    """
    path, _, function = row.test.partition("::")
    proof = next((name for name in aliases if any(_is_case(name, row, case) for case in cases)), "")
    reason = REASONS.get((row.mechanism, model_type), "")
    if reason and proof:
        raise ValueError(f"{function} proves {row.mechanism!r} for {model_type!r}; remove its reason, {reason!r}")
    if row.needs:
        is_used, without = NEEDS[row.needs]
        models = [(tiny.family_of(name), tiny.TINY[name](2)) for name in aliases if name in tiny.TINY]
        if not any(is_used(model, model.config_from_hf(hf)) for model, hf in models):
            return without
    if not (reason or proof):
        raise ValueError(f"no case of {row.test} proves {row.mechanism!r} for {model_type!r}; add one, or a reason")
    return reason or f"[{proof}](../tests/{path})"


def _is_case(name: str, row: Row, case: str) -> bool:
    """Whether an id is one of the family that has this alias, and of the row."""
    return bool(re.search(rf"(^|[-, ]){re.escape(name)}($|[-,])", case) and re.search(row.cases, case))


def page(rows: Mapping[str, Sequence[Row]] = ROWS) -> str:
    """The page of today."""
    aliases, ids = names(), collect([row for section in rows.values() for row in section])
    text = [
        "# What works for which family",
        "",
        "Drawn by `make support` from the tests, and held against them by one. A cell links to the file of the test",
        "that proves it and names the tiny model, family or published size it runs on:",
        '`pytest tests/parallel/test_conformance.py -k "test_cell and dense and fsdp"`. How mechanisms work together',
        "is drawn at random in [test_campaign.py](../tests/parallel/test_campaign.py).",
    ]
    for section, mechanisms in rows.items():
        text += ["", f"## {section}", "", f"| | test | {' | '.join(aliases)} |", "|---|---|" + "---|" * len(aliases)]
        for row in mechanisms:
            cells = [cell(row, name, mine, ids.get(row.test, ())) for name, mine in aliases.items()]
            text.append(f"| {row.mechanism} | `{row.test.partition('::')[2]}` | {' | '.join(cells)} |")
    return "\n".join([*text, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{sum(map(len, ROWS.values()))} mechanisms of {len(FAMILIES)} families\n")
