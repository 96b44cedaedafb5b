"""Limits on the XML of a spreadsheet file, so that a small file that unpacks to much cannot exhaust memory or time.

Sheets and shared texts are read as streams, and the XML of each row and each shared text is dropped after it is read.
All else stays in memory, as a tree with up to 25 times the size of its XML. So the rest of a part is limited, each row
and text, and the memory of all shared texts. A document type could define texts that expand.
"""

import sys
import zipfile
from types import TracebackType
from typing import IO, Any, Self
from xml.parsers import expat

from openpyxl.cell.text import Text
from openpyxl.reader.excel import ExcelReader
from openpyxl.xml.constants import SHARED_STRINGS, SHEET_MAIN_NS
from openpyxl.xml.functions import iterparse

from worker.rules.invoice_lines import InvoiceError

MAX_TREE_BYTES = 2 << 20
"""XML of a part that is not in rows or shared texts."""
MAX_ROW_BYTES = 1 << 20
"""XML of one row or one shared text."""
MAX_GAP_BYTES = 32
"""End tag and white space between two rows, which do not count as outside of rows."""
MAX_ROWS = 1_048_576
"""Rows of a sheet, which is the limit of spreadsheet programs."""
MAX_TEXTS_BYTES = 240 << 20
"""Memory of the shared texts of a file: two texts of 36 characters for each of 1,000,000 lines need 208 MiB."""
TEXT_OVERHEAD_BYTES = 24
"""Memory of one text beside its object: its place in the list, and the rounding of the allocation."""
MAX_PARTS = 10_000
CHUNK_BYTES = 16 * 1024
ROW, SHARED_TEXT = f"{SHEET_MAIN_NS} row", f"{SHEET_MAIN_NS} si"
_START_OF_PART_ENTRY = b"PK\x01\x02"


class LimitedReader(ExcelReader):  # type: ignore[misc]  # openpyxl has no types
    """openpyxl's reader of a spreadsheet file whose stated sizes were checked.

    Raises:
        InvoiceError: a part exceeds a limit, now or when a sheet is read.
    """

    def __init__(self, file: IO[bytes], **options: Any) -> None:
        super().__init__(file, **options)
        self.archive = _LimitedArchive(file)
        self.max_texts_bytes: int | None = None
        """Memory that the shared texts may need. None: `MAX_TEXTS_BYTES`."""

    def read_strings(self) -> None:
        """Read the shared texts as openpyxl does. It would keep an empty element for each."""
        self.archive.dropped_element = SHARED_TEXT
        if (part := self.package.find(SHARED_STRINGS)) is not None:
            with self.archive.open(part.PartName[1:]) as source:
                self.shared_strings = _shared_texts(source, self.max_texts_bytes or MAX_TEXTS_BYTES)
        self.archive.dropped_element = ROW


def _shared_texts(source: Any, max_bytes: int) -> list[str]:
    texts, size = list[str](), 0
    events = iterparse(source, events=("start", "end"))
    _, root = next(events)
    for event, node in events:
        if event == "end" and node.tag == f"{{{SHEET_MAIN_NS}}}si":
            text = Text.from_tree(node).content.replace("x005F_", "")
            root.clear()
            texts.append(text)
            size += sys.getsizeof(text) + TEXT_OVERHEAD_BYTES
            if size > max_bytes:
                raise InvoiceError(
                    f"the spreadsheet file has shared texts of more than {max_bytes >> 20} MiB; save it as CSV"
                )
    return texts


def check_part_count(data: bytes) -> None:
    """Raise InvoiceError if the archive lists too many parts. A listed part needs more memory than its entry."""
    if data.count(_START_OF_PART_ENTRY) > MAX_PARTS:
        raise InvoiceError(f"the spreadsheet file has more than {MAX_PARTS} parts; save it again, or as CSV")


class _LimitedArchive(zipfile.ZipFile):
    dropped_element: str | None = None
    """Element that the reader of a stream drops. None: the reader keeps all."""

    def read(self, name: Any, pwd: bytes | None = None) -> bytes:
        """Return a part that is parsed as a whole."""
        limits, chunks = _PartLimits(None), []
        with super().open(name, pwd=pwd) as part:
            while chunk := part.read(CHUNK_BYTES):
                limits.check(chunk)
                chunks.append(chunk)
        return b"".join(chunks)

    def open(self, name: Any, *arguments: Any, **options: Any) -> Any:
        """Return the stream of a part."""
        return _LimitedStream(super().open(name, *arguments, **options), _PartLimits(self.dropped_element))


class _LimitedStream:
    def __init__(self, part: IO[bytes], limits: "_PartLimits") -> None:
        self._part, self._limits = part, limits

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes. Without a size, these are few: openpyxl reads so only what it parses as a whole."""
        chunk = self._part.read(MAX_TREE_BYTES + 1 if size < 0 else min(size, CHUNK_BYTES))
        self._limits.check(chunk)
        return chunk

    def close(self) -> None:
        """Close the part."""
        self._part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _PartLimits:
    """Limits on one part, whose bytes are checked before openpyxl parses them."""

    def __init__(self, dropped_element: str | None) -> None:
        self._dropped_element = dropped_element
        self._parser: Any = expat.ParserCreate(namespace_separator=" ")
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.StartDoctypeDeclHandler = self._refuse_document_type
        self._size = self._dropped_size = self._row_count = self._depth_in_row = 0
        self._row_start = 0
        self._row_end: int | None = None
        """Where the last row ended, until another element begins."""

    def check(self, chunk: bytes) -> None:
        """Check the next bytes.

        Raises:
            InvoiceError: the part exceeds a limit with them.
        """
        self._size += len(chunk)
        if self._parser is not None:
            try:
                self._parser.Parse(chunk, False)
            except expat.ExpatError:
                self._parser = None  # openpyxl's own parser ends at this byte too
        if self._depth_in_row and self._size - self._row_start > MAX_ROW_BYTES:
            raise InvoiceError(f"the spreadsheet file has a row or a text of more than {MAX_ROW_BYTES >> 20} MiB")
        if not self._depth_in_row and self._size - self._dropped_size > MAX_TREE_BYTES:
            raise InvoiceError(
                f"the spreadsheet file has a part with more than {MAX_TREE_BYTES >> 20} MiB outside of rows; "
                "save it as CSV"
            )

    def _start(self, name: str, _attributes: object) -> None:
        if name == self._dropped_element:
            if not self._depth_in_row:
                self._begin_row(self._parser.CurrentByteIndex)
            self._depth_in_row += 1
        self._row_end = None

    def _begin_row(self, position: int) -> None:
        self._row_start = position
        if self._row_end is not None and position - self._row_end <= MAX_GAP_BYTES:
            self._row_start = self._row_end

    def _end(self, name: str) -> None:
        if name != self._dropped_element:
            return
        self._depth_in_row -= 1
        if not self._depth_in_row:
            self._row_end = self._parser.CurrentByteIndex
            self._dropped_size += self._row_end - self._row_start
            self._row_count += 1
            if name == ROW and self._row_count > MAX_ROWS:
                raise InvoiceError(f"a sheet has at most {MAX_ROWS} rows; save it as CSV")

    def _refuse_document_type(self, *_: object) -> None:
        raise InvoiceError("the spreadsheet file has a document type, as no spreadsheet program writes; save it as CSV")
