"""Text of times for logs and for people."""

from datetime import UTC, datetime


def utc_text(at: datetime) -> str:
    """Return a time in ISO 8601, in UTC with the suffix Z."""
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")
