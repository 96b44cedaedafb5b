"""Texts of errors in logs."""

import pytest
from sqlalchemy.exc import OperationalError

from worker.errors import error_summary

EXAMPLES = [
    (ValueError("bad"), "ValueError: bad"),
    (ValueError(), "ValueError:"),
    (ValueError("duplicate key\nDETAIL:  Key (amount)=(12.34) already exists."), "ValueError: duplicate key"),
    (OperationalError("SELECT 1", {}, TimeoutError("no answer\nfrom db")), "TimeoutError: no answer"),
]


@pytest.mark.parametrize(("error", "summary"), EXAMPLES)
def test_error_summary_is_the_class_and_first_line(error: Exception, summary: str) -> None:
    """Further lines of a database's error repeat values of a row. SQLAlchemy's error shows the driver's."""
    assert error_summary(error) == summary
