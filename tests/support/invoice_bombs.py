"""Small spreadsheet files that unpack to much: parts of openpyxl's own file are replaced."""

import io
import zipfile
from collections.abc import Callable, Mapping
from functools import partial

from openpyxl import Workbook

NAMESPACE = b"http://schemas.openxmlformats.org/spreadsheetml/2006/main"
SHEET, SHARED_TEXTS, STYLES = "xl/worksheets/sheet1.xml", "xl/sharedStrings.xml", "xl/styles.xml"
SHEET_HEAD = b'<worksheet xmlns="%s"><sheetData>' % NAMESPACE
SST_HEAD = b'<sst xmlns="%s">' % NAMESPACE
_STYLES_HEAD = b'<styleSheet xmlns="%s">' % NAMESPACE
_TYPE_OF_SHARED_TEXTS = (
    b'<Override PartName="/xl/sharedStrings.xml" '
    b'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"/></Types>'
)
_ENTITIES = b"".join(b'<!ENTITY a%d "%s">' % (n, b"&a%d;" % (n - 1) * 10 if n else b"a" * 20) for n in range(12))


def spreadsheet_with(part: str, content: bytes) -> bytes:
    """Return a spreadsheet file with one line of an invoice, one of whose parts has this content."""
    file, changed = io.BytesIO(), io.BytesIO()
    book = Workbook()
    for row in (("Account", "Date", "Amount"), ("acct_a", "2026-11-22", 0.1)):
        book.worksheets[0].append(row)
    book.save(file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if name == "[Content_Types].xml" and part == SHARED_TEXTS:
                new.writestr(name, old.read(name).replace(b"</Types>", _TYPE_OF_SHARED_TEXTS))
            elif name != part:
                new.writestr(name, old.read(name))
        new.writestr(part, content)
    return changed.getvalue()


def _bomb(part: str, start: bytes, repeated: bytes, end: bytes, mib: int) -> bytes:
    return spreadsheet_with(part, start + repeated * ((mib << 20) // len(repeated)) + end)


_ROWS_END, _OUTSIDE, _ONE = b"</sheetData></worksheet>", "outside of rows", "a row or a text of more than 1 MiB"
BOMBS: Mapping[str, tuple[Callable[[int], bytes], str]] = {
    "styles": (partial(_bomb, STYLES, _STYLES_HEAD, b"<a/>", b"</styleSheet>"), _OUTSIDE),
    "elements beside rows": (partial(_bomb, SHEET, SHEET_HEAD, b"<a/>", _ROWS_END), _OUTSIDE),
    "one row": (partial(_bomb, SHEET, SHEET_HEAD + b"<row>", b"<c/>", b"</row>" + _ROWS_END), _ONE),
    "one attribute": (partial(_bomb, SHEET, SHEET_HEAD + b'<row a="', b"x", b'"/>' + _ROWS_END), _OUTSIDE),
    "one comment": (partial(_bomb, SHEET, SHEET_HEAD + b"<!--", b"x", b"-->" + _ROWS_END), _OUTSIDE),
    "one cell": (
        partial(_bomb, SHEET, SHEET_HEAD + b'<row><c t="inlineStr"><is><t>', b"x", b"</t></is></c></row>" + _ROWS_END),
        _ONE,
    ),
    "one shared text": (partial(_bomb, SHARED_TEXTS, SST_HEAD + b"<si><t>", b"x", b"</t></si></sst>"), _ONE),
    "elements beside shared texts": (partial(_bomb, SHARED_TEXTS, SST_HEAD, b"<a/>", b"</sst>"), _OUTSIDE),
    "rows for shared texts": (partial(_bomb, SHARED_TEXTS, SHEET_HEAD, b"<row/>", _ROWS_END), _OUTSIDE),
    "shared texts in styles": (partial(_bomb, STYLES, SST_HEAD, b"<si/>", b"</sst>"), _OUTSIDE),
    "entities": (
        lambda _: spreadsheet_with(
            SHARED_TEXTS, b"<!DOCTYPE a [%s]>%s<si><t>&a11;</t></si></sst>" % (_ENTITIES, SST_HEAD)
        ),
        "a document type",
    ),
}
"""Files by name: a function of the size to which one part unpacks, in MiB, and the refusal."""
