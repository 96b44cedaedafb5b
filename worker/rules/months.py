"""Calendar months in UTC, which statements, invoices and archives are about. Pure."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta


@dataclass(frozen=True, kw_only=True)
class Month:
    """A calendar month, in UTC."""

    since: datetime
    """Its first moment."""
    until: datetime
    """The first moment of the next month."""

    @property
    def name(self) -> str:
        """The month as YYYY-MM."""
        return f"{self.since:%Y-%m}"

    @property
    def following(self) -> "Month":
        """The next month."""
        return month_of(self.until)


def month_of(at: datetime) -> Month:
    """Return the month with this moment."""
    since = at.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return Month(since=since, until=(since + timedelta(days=32)).replace(day=1))


def parse_month(text: str) -> Month | None:
    """Return the month that is written as YYYY-MM, or None."""
    match = re.fullmatch(r"([1-9][0-9]{3})-(0[1-9]|1[0-2])", text)
    if match is None or match[1] == "9999":
        return None
    return month_of(datetime(int(match[1]), int(match[2]), 1, tzinfo=UTC))
