"""A survey in words and bars, for the terminal; its tables are those of the page as well."""

from collections.abc import Mapping, Sequence

from mmfn.train.survey.counts import Counts, histogram, percentile, total
from mmfn.train.survey.fill import Fill, suggest
from mmfn.train.survey.survey import Survey

BAR = 40  # characters of the longest
SHARES = (("median", 0.5), ("95 %", 0.95), ("99 %", 0.99), ("longest", 1.0))
ROUND = 256  # units of a tower: what a suggested budget is a multiple of at most


def facts(survey: Survey) -> list[tuple[str, str]]:
    """`(name, value)` of what is counted."""
    counts = survey.counts
    tokens = total(counts.tokens)
    media = [(f"{kind}s", f"{_spread(counter)} tokens each") for kind, counter in counts.media.items()]
    return [
        ("rows", f"{counts.rows:,}, of these {counts.skipped:,} are skipped"),
        ("samples of text alone", f"{counts.text_only:,}"),
        ("tokens", f"{tokens:,}, of these {counts.trained:,} are learned ({counts.trained / max(1, tokens):.1%})"),
        ("tokens of a sample", _spread(counts.tokens)),
        *media,
    ]


def lengths(survey: Survey) -> dict[str, Mapping[int, int]]:
    """By title, what a histogram is drawn of."""
    kinds = {f"tokens of one {kind}": counter for kind, counter in survey.counts.media.items()}
    return {"tokens of a sample": survey.counts.tokens, **kinds}


def packing(survey: Survey) -> list[tuple[str, str, str, str]]:
    """`(tokens of a batch, real tokens, samples too long, samples of a batch)` for each budget that has batches."""
    return [
        (f"{fill.budget:,}", f"{fill.share:.1%}", f"{fill.too_long:,}", f"{fill.samples / fill.batches:.1f}")
        for fill in survey.fills
        if fill.batches
    ]


def settings(survey: Survey) -> str:
    """Budgets that suit the data, as they stand in a config; "" for data without a sample."""
    fill = suggest(survey.fills)
    if fill is None:
        return ""
    towers = ", ".join(f"{name}: [{size}]" for name, size in tower_sizes(fill, survey.inputs).items())
    return (
        f"data:\n  token_buckets: [{fill.budget}]\n  tower_buckets: {{{towers}}}\n"
        f"  batch_tokens: {fill.budget}  # times the ranks that have data of their own, times micro-batches of a step\n"
    )


def tower_sizes(fill: Fill, inputs: Mapping[str, int]) -> dict[str, int]:
    """Inputs of each tower that hold what a batch has, and little more: what stays empty is computed all the same.

    Units are rounded up by an eighth at most, of many to a multiple of `ROUND`: 42 -> 44, 5,000 -> 5,120.
    """

    def rounded(units: int) -> int:
        step = min(ROUND, 1 << max(0, units.bit_length() - 4))
        return max(1, -(-units // step) * step)

    return {name: rounded(num) * inputs[name] for name, num in fill.units.items()}


def reasons(counts: Counts) -> list[tuple[int, str, Sequence[str]]]:
    """`(rows, kind of reason, first sentences)`, the most frequent first."""
    most = sorted(counts.reasons.items(), key=lambda item: -item[1].count)
    return [(reason.count, kind, reason.examples) for kind, reason in most]


def on_terminal(survey: Survey) -> str:
    """Everything but the samples themselves."""
    width = max(len(name) for name, _ in facts(survey))
    lines = [f"{name:<{width}}  {value}" for name, value in facts(survey)]
    for title, counter in lengths(survey).items():
        lines += ["", f"{title}:", *_bars(counter)] if counter else []
    if rows := packing(survey):
        head = ("tokens of a batch", "real tokens", "too long", "samples")
        lines += ["", *_table([head, *rows])]
    if text := settings(survey):
        lines += ["", "suggested settings:", text.rstrip()]
    for count, _, examples in reasons(survey.counts):
        lines += ["", f"{count:,} skipped, as:", *(f"  {sentence}" for sentence in examples)]
    return "\n".join(lines)


def _spread(counter: Mapping[int, int]) -> str:
    count = sum(counter.values())
    shares = ", ".join(f"{name} {percentile(counter, share):,}" for name, share in SHARES)
    return f"{count:,}: mean {total(counter) / max(1, count):,.0f}, {shares}"


def _bars(counter: Mapping[int, int]) -> list[str]:
    ranges = histogram(counter)
    most = max((count for _, _, count in ranges), default=1)
    return [f"  {f'{low:,} to {high - 1:,}':>20} {'█' * -(-BAR * n // most):<{BAR}} {n:,}" for low, high, n in ranges]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
