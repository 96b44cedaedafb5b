"""Times as text: for logs, for people, and as people write them."""

from datetime import UTC, datetime


def utc_text(at: datetime) -> str:
    """Return a time in ISO 8601, in UTC with the suffix Z, cut to seconds: `2026-11-23T12:00:05Z`."""
    return at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds") + "Z"


def utc_time_text(at: datetime) -> str:
    """Return a time in UTC to the second for people, such as `2026-11-22 12:00:00Z`."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


def parse_utc_time(text: str) -> datetime:
    """Parse a day or a time in ISO 8601. Without a time zone it is in UTC.

    Raises:
        ValueError: it is neither. The message says what to write.
    """
    try:
        at = datetime.fromisoformat(text)
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("must be a day or a time, such as 2026-11-22 or 2026-11-22T12:00:00Z") from None
