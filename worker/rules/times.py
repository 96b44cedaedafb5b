"""Text of times for logs and for people."""

from datetime import UTC, datetime


def utc_text(at: datetime) -> str:
    """Return a time in ISO 8601, in UTC with the suffix Z, cut to seconds: `2026-11-23T12:00:05Z`."""
    return at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds") + "Z"
