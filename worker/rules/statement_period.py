"""The period of a fee statement: one month or several, in UTC. Pure."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from worker.rules.months import Month, month_of, parse_month

MAX_MONTHS = 60
"""Maximum number of months of a period."""


@dataclass(frozen=True, kw_only=True)
class StatementPeriod:
    """Consecutive months, in UTC."""

    months: tuple[Month, ...]

    @property
    def name(self) -> str:
        """The period as it is given: `2026-11`, or `2026-10..2026-12`."""
        first, last = self.months[0].name, self.months[-1].name
        return first if first == last else f"{first}..{last}"

    @property
    def since(self) -> datetime:
        """Its first moment."""
        return self.months[0].since

    @property
    def until(self) -> datetime:
        """The first moment after it."""
        return self.months[-1].until

    @property
    def previous(self) -> "StatementPeriod":
        """The period of as many months before it."""
        months = list(self.months)
        for _ in self.months:
            months = [_month_before(months[0]), *months[:-1]]
        return StatementPeriod(months=tuple(months))


def _month_before(month: Month) -> Month:
    return month_of(month.since - timedelta(days=1))


def parse_period(text: str) -> StatementPeriod | None:
    """Return the period that is written as YYYY-MM, or as YYYY-MM..YYYY-MM with its last month. None if it is neither.

    A period of more than `MAX_MONTHS` months is none.
    """
    first_text, separator, last_text = text.partition("..")
    first, last = parse_month(first_text), parse_month(last_text if separator else first_text)
    if first is None or last is None:
        return None
    months = [first]
    while months[-1].since < last.since and len(months) < MAX_MONTHS:
        months.append(months[-1].following)
    return StatementPeriod(months=tuple(months)) if months[-1] == last else None
