"""Read an invoice from the bytes of a file: CSV of any common dialect, or a spreadsheet. Pure.

What options and a profile do not confirm is proposed from the file, and listed as an assumption. A file that can be
read in two ways is rejected with the option that decides it. A file with one wrong line is rejected as a whole, with
the line and the reason, because half an invoice proves nothing.
"""

from worker.rules.invoice_reading.invoice_reader import read_invoice
from worker.rules.invoice_reading.profiles import parse_profile, profile_text
from worker.rules.invoice_reading.reading_options import NO_COLUMN, ReadingOptions, Role, options_of_profile

__all__ = [
    "NO_COLUMN",
    "ReadingOptions",
    "Role",
    "options_of_profile",
    "parse_profile",
    "profile_text",
    "read_invoice",
]
