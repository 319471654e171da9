"""Workbooks: read back by what the format says, with Python's own readers of zip and XML."""

import re
from pathlib import Path
from xml.etree import ElementTree
from zipfile import ZipFile

import pytest

from mmfn.train.benchmarks.xlsx import LONGEST, MAIN, OFFICE, PACKAGE, write_workbook

SPACES = {"m": MAIN, "r": PACKAGE + "/relationships"}


def read(path: Path) -> dict[str, dict[str, str | float]]:
    """Sheet -> cell -> value, found as a reader finds them: from the root's relations on."""
    with ZipFile(path) as archive:
        assert archive.testzip() is None

        def relations(name: str) -> dict[str, str]:
            root = ElementTree.fromstring(archive.read(name))
            return {rel.get("Id"): rel.get("Target") for rel in root.iterfind("r:Relationship", SPACES)}

        (book,) = relations("_rels/.rels").values()
        targets = relations("xl/_rels/workbook.xml.rels")
        types = archive.read("[Content_Types].xml").decode()
        found = {}
        for sheet in ElementTree.fromstring(archive.read(book)).iterfind("m:sheets/m:sheet", SPACES):
            part = f"xl/{targets[sheet.get(f'{{{OFFICE}}}id')]}"
            assert f'PartName="/{part}"' in types
            cells = ElementTree.fromstring(archive.read(part)).iterfind("m:sheetData/m:row/m:c", SPACES)
            found[sheet.get("name")] = {
                cell.get("r"): cell.findtext("m:is/m:t", namespaces=SPACES)
                if cell.get("t") == "inlineStr"
                else float(cell.findtext("m:v", namespaces=SPACES))
                for cell in cells
            }
    return found


def test_values_are_read_back(tmp_path: Path) -> None:
    table = [["a<b>&\"'", 1, 0.1 + 0.2], [" \n\r\ttext ", -3e-9, "\N{PILE OF POO}"], ["", float("nan"), True]]
    write_workbook(tmp_path / "x.xlsx", {"first & only": table, "other": [["x"] * 28]})
    first, other = read(tmp_path / "x.xlsx").values()
    assert first == {
        "A1": "a<b>&\"'",
        "B1": 1.0,
        "C1": 0.1 + 0.2,
        "A2": " \n\r\ttext ",
        "B2": -3e-9,
        "C2": "\N{PILE OF POO}",
        "A3": "",
        "B3": "nan",
        "C3": "True",
    }
    assert list(other)[24:] == ["Y1", "Z1", "AA1", "AB1"]
    assert list(read(tmp_path / "x.xlsx")) == ["first & only", "other"]


def test_what_no_cell_can_hold(tmp_path: Path) -> None:
    write_workbook(tmp_path / "x.xlsx", {"s": [["a\x00b\x1fc\ud800", "x" * (LONGEST + 5)]]})
    assert read(tmp_path / "x.xlsx")["s"] == {"A1": "abc", "B1": "x" * LONGEST}


def test_other_readers_agree(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    write_workbook(tmp_path / "x.xlsx", {"s": [["a & b", 1], ["c", 2.5]]})
    sheet = openpyxl.load_workbook(tmp_path / "x.xlsx")["s"]
    assert [[cell.value for cell in row] for row in sheet.iter_rows()] == [["a & b", 1], ["c", 2.5]]
    assert re.fullmatch(r"A1:B2", sheet.dimensions)
