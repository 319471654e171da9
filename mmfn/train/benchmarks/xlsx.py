"""Tables as an Excel workbook (Office Open XML), of text and numbers: a zip of small XML files."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr
from zipfile import ZIP_DEFLATED, ZipFile

Cell = str | float | int
Table = Sequence[Sequence[Cell]]

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
KIND = "application/vnd.openxmlformats-officedocument.spreadsheetml"
HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
LONGEST = 32_767  # characters of a cell
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")  # in XML


def write_workbook(path: Path, sheets: Mapping[str, Table]) -> None:
    """Write tables as sheets by name. Text is cut to what a cell holds, and loses characters that XML cannot hold."""
    places = range(1, len(sheets) + 1)
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        parts = [("/xl/workbook.xml", "sheet.main"), *((f"/xl/worksheets/sheet{i}.xml", "worksheet") for i in places)]
        types = "".join(f'<Override PartName="{name}" ContentType="{KIND}.{kind}+xml"/>' for name, kind in parts)
        rels = '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        xml = '<Default Extension="xml" ContentType="application/xml"/>'
        archive.writestr(
            "[Content_Types].xml", f'{HEAD}<Types xmlns="{PACKAGE}/content-types">{rels}{xml}{types}</Types>'
        )
        archive.writestr("_rels/.rels", _relations([("officeDocument", "xl/workbook.xml")]))
        targets = [("worksheet", f"worksheets/sheet{i}.xml") for i in places]
        archive.writestr("xl/_rels/workbook.xml.rels", _relations(targets))
        names = "".join(
            f'<sheet name={quoteattr(name)} sheetId="{i}" r:id="rId{i}"/>'
            for i, name in zip(places, sheets, strict=True)
        )
        archive.writestr(
            "xl/workbook.xml", f'{HEAD}<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}"><sheets>{names}</sheets></workbook>'
        )
        for i, table in zip(places, sheets.values(), strict=True):
            with archive.open(f"xl/worksheets/sheet{i}.xml", "w") as file:
                for text in _sheet(table):
                    file.write(text.encode())


def _relations(targets: Sequence[tuple[str, str]]) -> str:
    rows = "".join(
        f'<Relationship Id="rId{i}" Type="{OFFICE}/{kind}" Target="{target}"/>'
        for i, (kind, target) in enumerate(targets, start=1)
    )
    return f'{HEAD}<Relationships xmlns="{PACKAGE}/relationships">{rows}</Relationships>'


def _sheet(table: Table) -> Iterator[str]:
    yield f'{HEAD}<worksheet xmlns="{MAIN}"><sheetData>'
    for number, row in enumerate(table, start=1):
        cells = "".join(_cell(f"{_column(place)}{number}", value) for place, value in enumerate(row))
        yield f'<row r="{number}">{cells}</row>'
    yield "</sheetData></worksheet>"


def _cell(name: str, value: Cell) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return f'<c r="{name}"><v>{value!r}</v></c>'
    text = escape(FORBIDDEN.sub("", str(value))[:LONGEST], {"\r": "&#13;"})
    return f'<c r="{name}" t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'


def _column(place: int) -> str:
    """A, B, ..., Z, AA, ...

    >>> _column(27)
    'AB'
    """
    letters = ""
    place += 1
    while place:
        place, rest = divmod(place - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters
