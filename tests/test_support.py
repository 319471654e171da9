"""The page of what works for which family is that of today, and no cell of it is empty."""

import pytest

from docs import support
from docs.support import Row, cell
from mmfn.models import FAMILIES

IDS = ("dense, dp 2, fsdp, mixed", "small-remat", "qwen3_vl-3")
ROW = Row("fsdp", "parallel/test_conformance.py::test_cell", ", fsdp, ")


def test_the_page_is_that_of_today() -> None:
    assert support.PAGE.read_text(encoding="utf-8") == support.page(), "run make support"


def test_every_row_is_another_mechanism_and_every_family_has_a_column() -> None:
    rows = [row.mechanism for section in support.ROWS.values() for row in section]
    assert len(set(rows)) == len(rows)
    assert list(support.names()) == list(FAMILIES)
    assert all(mechanism in rows and name in FAMILIES for mechanism, name in support.REASONS)


def test_a_cell_names_what_its_test_runs_on() -> None:
    assert cell(ROW, "qwen3_vl", ["small", "dense"], IDS) == "[dense](../tests/parallel/test_conformance.py)"
    assert cell(Row("ep", "a.py::test", needs="experts"), "qwen3_vl", ["dense"], IDS) == "no experts"


@pytest.mark.parametrize("aliases", [["small"], ["dens"], ["qwen3_vl", "3"], []])
def test_a_cell_without_a_test_is_refused(aliases: list[str]) -> None:
    with pytest.raises(ValueError, match=r"no case of .*::test_cell proves 'fsdp' for 'qwen3_vl'"):
        cell(ROW, "qwen3_vl", aliases, IDS)


def test_a_reason_stands_for_a_test_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support.REASONS, ("fsdp", "qwen3_vl"), "cut by segments")
    assert cell(ROW, "qwen3_vl", ["small"], IDS) == "cut by segments"
    with pytest.raises(ValueError, match="proves 'fsdp' for 'qwen3_vl'; remove its reason, 'cut by segments'"):
        cell(ROW, "qwen3_vl", ["dense"], IDS)
