"""Dates and times as files write them, as spans of time in UTC."""

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo

from worker.rules.invoice_format import DateStyle

_DAY = r"(?P<day>[0-9]{1,2})"
_MONTH = r"(?P<month>[0-9]{1,2})"
_NAME = r"(?P<name>[A-Za-z]{3,9})\.?"
_YEAR = r"(?P<year>[0-9]{4})"
_ANY_YEAR = r"(?P<year>[0-9]{4}|[0-9]{2})"
_STYLES = {
    style: re.compile(pattern)
    for style, pattern in {
        DateStyle.ISO: rf"{_YEAR}-(?P<month>[0-9]{{2}})-(?P<day>[0-9]{{2}})",
        DateStyle.YEAR_SLASH: f"{_YEAR}/{_MONTH}/{_DAY}",
        DateStyle.MONTH_FIRST: f"{_MONTH}/{_DAY}/{_ANY_YEAR}",
        DateStyle.DAY_FIRST_SLASH: f"{_DAY}/{_MONTH}/{_ANY_YEAR}",
        DateStyle.DAY_FIRST_DOT: rf"{_DAY}\.{_MONTH}\.{_ANY_YEAR}",
        DateStyle.DAY_FIRST_DASH: f"{_DAY}-{_MONTH}-{_ANY_YEAR}",
        DateStyle.MONTH_FIRST_DASH: f"{_MONTH}-{_DAY}-{_ANY_YEAR}",
        DateStyle.COMPACT: r"(?P<year>[0-9]{4})(?P<month>[0-9]{2})(?P<day>[0-9]{2})",
        DateStyle.MONTH_NAME: rf"{_NAME} {_DAY},? {_YEAR}",
        DateStyle.MONTH_NAME_DAY_FIRST: rf"{_DAY}[ -]{_NAME}[ -]{_ANY_YEAR}",
    }.items()
}
_WHOLE_MONTHS = tuple(
    re.compile(pattern) for pattern in (f"{_YEAR}-{_MONTH}", f"{_MONTH}/{_YEAR}", rf"{_NAME},? {_YEAR}")
)
_ISO_WEEK_DAY = re.compile(r"[0-9]{4}-W[0-9]{2}-[1-7]")
_EPOCH = re.compile(r"(?P<seconds>[0-9]{10})(?P<milliseconds>[0-9]{3})?")
"""The length decides which of both it is: a time of this century has 10 or 13 digits."""
_TIME = re.compile(
    r"(?P<date>.*?[0-9A-Za-z])(?:[ ,]+|(?<=[0-9])T)(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})"
    r"(?::(?P<second>[0-9]{2})(?:[.,](?P<fraction>[0-9]{1,6})[0-9]{0,3})?)?"
    r"(?: ?(?P<half>[AaPp])\.?[Mm]\.?)?"
    r"(?: ?(?P<zone>Z|UTC|GMT|(?:UTC|GMT)?(?P<sign>[+-])(?P<zone_hour>[0-9]{2})(?::?(?P<zone_minute>[0-9]{2}))?))?"
)
_RANGE = re.compile(r"(?P<first>.+?)(?: (?:-|\u2013|to|until|bis) |/(?=[0-9]{4}-))(?P<last>.+)")
_MONTH_NAMES = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_MAX_LENGTH = 80
_ISO_LENGTH = len("2026-11-22T12:00:00")


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeSpan:
    """A span in UTC. A time has the same start and end."""

    since: datetime
    until: datetime
    is_zoneless_midnight: bool = False
    """A time 00:00 without a zone: in a file without other times it is a day."""


class ZonelessTimeError(ValueError):
    """A time has no zone, and none is given."""


def parse_day(style: DateStyle, text: str) -> date | None:
    """Return a day that is written in this style, or None."""
    match = _STYLES[style].fullmatch(text)
    if match is None:
        return None
    parts = match.groupdict()
    month = int(parts["month"]) if "month" in parts else _month_of_name(parts["name"])
    year = int(parts["year"]) + (2000 if len(parts["year"]) == 2 else 0)  # noqa: PLR2004 - digits of a year
    try:
        return date(year, month, int(parts["day"]))
    except ValueError:
        return None


def _parse_iso_week_day(text: str) -> date | None:
    """Return a day such as 2026-W48-1, a Monday, which can be read in one way only."""
    try:
        return date.fromisoformat(text) if _ISO_WEEK_DAY.fullmatch(text) else None
    except ValueError:
        return None


def _month_of_name(name: str) -> int:
    """Return a month by its English name or the name's first letters; 0 if there is none."""
    return next((number for number, full in enumerate(_MONTH_NAMES, 1) if full.startswith(name.lower())), 0)


def day_texts(text: str) -> tuple[str, ...]:
    """Return the parts of a date that a date style describes: the day without a time, or both days of a range."""
    if len(text) > _MAX_LENGTH:
        return ()
    if match := _TIME.fullmatch(text):
        return (match["date"],)
    match = _RANGE.fullmatch(text)
    return (match["first"], match["last"]) if match else (text,)


class DateReader:
    """Parse dates and times of one style. Days, and times without a zone, are in one time zone."""

    def __init__(self, style: DateStyle, zone: tzinfo, *, zone_is_known: bool) -> None:
        """Initialize. Unless the zone is known, times need a zone of their own."""
        self._style = style
        self._zone = zone
        self._zone_is_known = zone_is_known
        self.has_days = False
        """Whether a day or a month was read, which depends on the zone."""
        self.has_zoneless_times = False
        """Whether a time without a zone was read, other than 00:00."""
        self.has_epoch_times = False
        """Whether a number of seconds or milliseconds since 1970 was read."""
        self._cache: dict[str, TimeSpan] = {}

    def read(self, text: str) -> TimeSpan | None:
        """Return the span of a time, a day, a month or a range; None if it is not written in the style.

        Raises:
            ZonelessTimeError: a time has no zone, and none is given.
        """
        if span := self._cache.get(text):
            return span
        if len(text) > _MAX_LENGTH:
            return None
        try:
            span = self._read(text)
        except OverflowError:
            return None
        if span is not None and span.since != span.until:
            self._cache[text] = span
        return span

    def _read(self, text: str) -> TimeSpan | None:
        if self._style is DateStyle.ISO and len(text) > _ISO_LENGTH and text[4] == text[7] == "-":
            try:
                at = datetime.fromisoformat(text)
            except ValueError:
                pass
            else:
                if at.tzinfo is not None:
                    at = at.astimezone(UTC)
                    return TimeSpan(since=at, until=at)
        return self._read_epoch(text) or self._read_time(text) or self._read_days(text)

    def _read_epoch(self, text: str) -> TimeSpan | None:
        match = _EPOCH.fullmatch(text)
        if match is None:
            return None
        self.has_epoch_times = True
        milliseconds = timedelta(milliseconds=int(match["milliseconds"] or 0))
        at = datetime.fromtimestamp(int(match["seconds"]), UTC) + milliseconds
        return TimeSpan(since=at, until=at)

    def _read_time(self, text: str) -> TimeSpan | None:
        match = _TIME.fullmatch(text)
        day = parse_day(self._style, match["date"]) if match else None
        clock = _clock_time(match) if match else None
        if match is None or day is None or clock is None:
            return None
        if match["zone"] is None:
            return self.read_zoneless(datetime.combine(day, clock))
        zone = _offset(match)
        if zone is None:
            return None
        at = datetime.combine(day, clock, zone).astimezone(UTC)
        return TimeSpan(since=at, until=at)

    def read_zoneless(self, at: datetime) -> TimeSpan:
        """Return the span of a time without a zone; for 00:00 the span of its day.

        A time that the clocks repeat in autumn is the span from the first to the second.

        Raises:
            ZonelessTimeError: the zone is not known, and the time is not 00:00.
        """
        if at.time() == time.min:
            day = self._span_of_days(at.date(), at.date())
            return TimeSpan(since=day.since, until=day.until, is_zoneless_midnight=True)
        if not self._zone_is_known:
            raise ZonelessTimeError
        self.has_zoneless_times = True
        times = [at.replace(tzinfo=self._zone, fold=fold).astimezone(UTC) for fold in (0, 1)]
        return TimeSpan(since=min(times), until=max(times))

    def _read_days(self, text: str) -> TimeSpan | None:
        match = _RANGE.fullmatch(text)
        if match is None:
            return self._read_day_or_month(text)
        first, last = self._read_day_or_month(match["first"]), self._read_day_or_month(match["last"])
        if first is None or last is None or last.until <= first.since:
            return None
        return TimeSpan(since=first.since, until=last.until)

    def _read_day_or_month(self, text: str) -> TimeSpan | None:
        if day := parse_day(self._style, text) or _parse_iso_week_day(text):
            return self._span_of_days(day, day)
        for pattern in _WHOLE_MONTHS:
            if match := pattern.fullmatch(text):
                parts = match.groupdict()
                month = int(parts["month"]) if "month" in parts else _month_of_name(parts["name"])
                return self._span_of_month(int(parts["year"]), month)
        return None

    def _span_of_month(self, year: int, month: int) -> TimeSpan | None:
        try:
            first = date(year, month, 1)
        except ValueError:
            return None
        next_month = (first + timedelta(days=31)).replace(day=1)
        return self._span_of_days(first, next_month - timedelta(days=1))

    def _span_of_days(self, first: date, last: date) -> TimeSpan:
        self.has_days = True
        ends = [datetime.combine(day, time.min, self._zone) for day in (first, last + timedelta(days=1))]
        since, until = (end.astimezone(UTC) for end in ends)
        return TimeSpan(since=since, until=until)


def _clock_time(match: re.Match[str]) -> time | None:
    hour = int(match["hour"])
    if match["half"]:
        if not 1 <= hour <= 12:  # noqa: PLR2004 - hours of a clock
            return None
        hour = hour % 12 + (12 if match["half"] in "pP" else 0)
    fraction = (match["fraction"] or "").ljust(6, "0")
    try:
        return time(hour, int(match["minute"]), int(match["second"] or 0), int(fraction))
    except ValueError:
        return None


def _offset(match: re.Match[str]) -> tzinfo | None:
    if not match["sign"]:
        return UTC
    offset = timedelta(hours=int(match["zone_hour"]), minutes=int(match["zone_minute"] or 0))
    try:
        return timezone(-offset if match["sign"] == "-" else offset)
    except ValueError:
        return None
