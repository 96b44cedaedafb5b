"""CSV files: encoding, delimiter, rows."""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence

from worker.rules.invoice_lines import InvoiceError
from worker.rules.invoice_reading.reading_options import ReadingOptions
from worker.rules.invoice_reading.row_table import Cell

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
SEPARATOR_LINE = re.compile(r"sep=(.)\s*")
"""The first line by which Excel names the delimiter."""
SAMPLE_BYTES = 4096
MAX_COLUMNS = 1000
"""A line with more is no line of an invoice. Reading millions of them would occupy the process."""

MAX_ROW_CHARS = 1 << 20
"""A row with more would be millions of cells before they can be counted."""
MAX_ROWS = 2_000_000


class CsvTable:
    """A CSV file in one encoding, split by one delimiter."""

    sheet = None

    def __init__(self, data: bytes, *, encoding: str, delimiter: str) -> None:
        self._data = data
        self.encoding = encoding
        self.delimiter = delimiter

    def rows(self) -> Iterator[tuple[int, Sequence[Cell]]]:
        """Return each row with the number of its first line. Raise InvoiceError where the file is no CSV."""
        text = io.TextIOWrapper(io.BytesIO(self._data), encoding=self.encoding, newline="")
        row, row_chars = 1, 0

        def lines() -> Iterator[str]:
            nonlocal row_chars
            for line in text:
                row_chars += len(line)
                if row_chars > MAX_ROW_CHARS:
                    raise InvoiceError(f"line {row}: more than {MAX_ROW_CHARS} characters; the file is no invoice")
                yield line

        reader = csv.reader(lines(), delimiter=self.delimiter, strict=True, skipinitialspace=True)
        try:
            for count, cells in enumerate(reader, 1):
                row_chars = 0
                if count > MAX_ROWS:
                    raise InvoiceError(f"line {row}: an invoice has at most {MAX_ROWS} lines; split the file by time")
                if len(cells) > MAX_COLUMNS:
                    raise InvoiceError(f"line {row}: more than {MAX_COLUMNS} columns; the file is no invoice")
                yield row, cells
                row = reader.line_num + 1
        except csv.Error as error:
            raise InvoiceError(
                f"line {row}: not CSV: {error}; the file may be cut off, or have another --delimiter"
            ) from None

    def ends_within_line(self) -> bool:
        """Return whether the last line has no line end."""
        return not self._data[-4:].rstrip(b"\0").endswith((b"\n", b"\r"))  # UTF-16 has a NUL beside it


def csv_candidates(data: bytes, options: ReadingOptions, assumptions: list[str]) -> list[CsvTable]:
    """Return the file, once for each delimiter that it may have.

    Raises:
        InvoiceError: the file is no text, or not in the given encoding.
    """
    if options.sheet is not None:
        raise InvoiceError(f"the file is CSV, so it has no sheet {options.sheet!r}; leave out --sheet")
    encoding = _encoding(data, options.encoding, assumptions)
    return [CsvTable(data, encoding=encoding, delimiter=each) for each in _delimiters(data, encoding, options)]


def _delimiters(data: bytes, encoding: str, options: ReadingOptions) -> Sequence[str]:
    given = options.delimiter
    if given is not None:
        delimiter = "\t" if given in ("tab", "\\t") else given
        if len(delimiter) != 1 or not (delimiter.isprintable() or delimiter == "\t") or delimiter == '"':
            raise InvoiceError(f"--delimiter must be one character, or tab: {given!r}")
        return [delimiter]
    first_line = io.TextIOWrapper(io.BytesIO(data[:SAMPLE_BYTES]), encoding=encoding, errors="replace").readline()
    if match := SEPARATOR_LINE.fullmatch(first_line):
        return [match[1]]
    return list(DELIMITERS)


def _encoding(data: bytes, given: str | None, assumptions: list[str]) -> str:
    encoding = _known_encoding(given) if given is not None else _proposed_encoding(data)
    try:
        text = io.TextIOWrapper(io.BytesIO(data), encoding=encoding, newline="").read()
    except UnicodeError as error:  # without a position for a missing byte order mark
        line = data.count(b"\n", 0, getattr(error, "start", 0)) + 1
        example = "shift_jis" if encoding == "cp1252" else "cp1252"
        raise InvoiceError(f"line {line}: not {encoding}; give the file's --encoding, such as {example}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InvoiceError(f"line {line}: a NUL character; the file is neither CSV nor xlsx, or has another --encoding")
    if given is None and encoding != "utf-8-sig":
        assumptions.append(f"The encoding is {encoding} (--encoding).")
    return encoding


def _known_encoding(name: str) -> str:
    sample = "a,b\n" * SAMPLE_BYTES  # longer than a buffer: a codec such as punycode decodes only whole texts
    try:
        encoded = io.BytesIO(sample.encode(name))
        is_text = "".join(io.TextIOWrapper(encoded, encoding=name, errors="replace")) == sample
    except (LookupError, ValueError):  # UnicodeError is a ValueError
        is_text = False
    if not is_text:
        raise InvoiceError(f"--encoding must be one such as utf-8, cp1252 or utf-16: {name!r}")
    known = codecs.lookup(name).name
    # A byte order mark is no part of the first column's name.
    return "utf-8-sig" if known == "utf-8" else known


def _proposed_encoding(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    sample = data[:SAMPLE_BYTES]
    if sample.count(0) > len(sample) // 4:
        return "utf-16-le" if sample[1::2].count(0) > sample[::2].count(0) else "utf-16-be"
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"
