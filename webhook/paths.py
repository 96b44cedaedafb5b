"""The path of the webhook, and paths that were probably meant to be it."""

import re
from collections.abc import Iterable

from webhook.signature import SIGNATURE_HEADER

PATH = "/webhooks/quiltt"
_SIGNATURE = SIGNATURE_HEADER.lower().encode()


def difference_from_path(path: str, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return how the path of a request differs from `PATH`, or None if the request has nothing to do with the webhook.

    The result is one of a few words, and never a part of the request: those are logged.
    """
    normalized = re.sub("/+", "/", path).rstrip("/").lower()
    if normalized == PATH:
        return _difference_in_spelling(path)
    if normalized.endswith(PATH):
        return "prefix"
    if normalized.startswith(f"{PATH}/"):
        return "suffix"
    if any(name == _SIGNATURE for name, _ in headers):
        return "other_path"
    return None


def _difference_in_spelling(path: str) -> str:
    if "//" in path:
        return "repeated_slash"
    if path.endswith("/"):
        return "trailing_slash"
    return "case"
