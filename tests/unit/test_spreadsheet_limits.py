"""Small spreadsheet files and CSV files that would exhaust memory or time: each is refused with a sentence."""

import io
import zipfile

import pytest

from tests.support.invoice_bombs import BOMBS, SHARED_TEXTS, SHEET, SHEET_HEAD, SST_HEAD, spreadsheet_with
from tests.support.invoice_files import read
from worker.rules.invoice_lines import InvoiceError
from worker.rules.invoice_reading import csv_tables, spreadsheet_limits


@pytest.mark.parametrize(("name", "problem"), [(name, problem) for name, (_, problem) in BOMBS.items()])
def test_file_that_unpacks_to_much_is_refused(name: str, problem: str) -> None:
    data = BOMBS[name][0](8)
    assert len(data) < 100_000
    with pytest.raises(InvoiceError, match=problem):
        read(data)


def test_many_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreadsheet_limits, "MAX_ROWS", 1000)
    with pytest.raises(InvoiceError, match="at most 1000 rows"):
        read(spreadsheet_with(SHEET, SHEET_HEAD + b"<row/>" * 1001))


@pytest.mark.parametrize("text", ["x" * 2000, "x" * 500 + "\N{GRINNING FACE}"])
def test_shared_texts_are_limited_by_their_memory(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wide character makes each character of its text need four bytes."""
    monkeypatch.setattr(spreadsheet_limits, "MAX_TEXTS_BYTES", 1 << 20)
    item = f"<si><t>{text}</t></si>".encode()
    with pytest.raises(InvoiceError, match="shared texts of more than 1 MiB"):
        read(spreadsheet_with(SHARED_TEXTS, SST_HEAD + item * 600 + b"</sst>"))


def test_two_unique_texts_in_each_of_a_million_lines_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a thousandth: an account and a reference in each line of a real invoice are shared texts."""
    monkeypatch.setattr(spreadsheet_limits, "MAX_TEXTS_BYTES", spreadsheet_limits.MAX_TEXTS_BYTES // 1000)
    monkeypatch.setattr(spreadsheet_limits, "MAX_ROWS", spreadsheet_limits.MAX_ROWS // 1000)
    texts = b"".join(b"<si><t>%036d</t></si>" % number for number in range(2000))
    content = read(spreadsheet_with(SHARED_TEXTS, SST_HEAD + texts + b"</sst>"))
    assert len(content.lines) == 1


def test_white_space_between_rows_is_not_outside_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some programs write each row on a line of its own."""
    monkeypatch.setattr(spreadsheet_limits, "MAX_TREE_BYTES", 20_000)
    rows = b'\n      <row><c t="inlineStr"><is><t>x</t></is></c></row>' * 2000
    data = spreadsheet_with(SHEET, SHEET_HEAD + rows + b"</sheetData></worksheet>")
    with pytest.raises(InvoiceError, match="no line names the columns"):
        read(data)


def test_many_parts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreadsheet_limits, "MAX_PARTS", 100)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(101):
            archive.writestr(str(number), b"")
    with pytest.raises(InvoiceError, match="more than 100 parts"):
        read(file.getvalue())


def test_csv_of_many_empty_lines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_tables, "MAX_ROWS", 1000)
    with pytest.raises(InvoiceError, match="at most 1000 lines"):
        read("Account,Date,Amount\n" + "\n" * 1000)


@pytest.mark.parametrize("repeated", ["x", ",", '"\n",'])
def test_csv_of_one_huge_row_is_refused(repeated: str) -> None:
    """Also if the row has many lines, in quotes."""
    with pytest.raises(InvoiceError, match="line 2: more than 1048576 characters"):
        read("Account,Date,Amount\n" + repeated * (8 << 20))
