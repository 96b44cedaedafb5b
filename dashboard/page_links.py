"""Addresses of pages about one payment, account or task. Ids are hostile input: each is quoted as a whole."""

from collections.abc import Mapping
from urllib.parse import quote, urlencode

from config.settings import Settings

_DOT_SEGMENTS = (".", "..")
"""Browsers remove these from a path, also if they are quoted."""


def payment_path(payment_id: str) -> str:
    """Return the path of a payment's page."""
    if payment_id in _DOT_SEGMENTS or "\n" in payment_id:  # a route's path has no line break
        return f"/payments/?{urlencode({'id': payment_id})}"
    return f"/payments/{quote(payment_id, safe='', errors='replace')}"


def payments_path(**conditions: str) -> str:
    """Return the path of the search for payments with these conditions, such as `account="acct_1"`."""
    return _path_with_query("/payments", conditions)


def payment_action_path(action: str, payment_id: str) -> str:
    """Return the path of the page that asks before an action on a payment, such as `cancel`."""
    return _path_with_query(f"/payment-actions/{action}", {"payment_id": payment_id})


def _path_with_query(path: str, fields: Mapping[str, str]) -> str:
    return f"{path}?{urlencode(fields, errors='replace')}" if fields else path


def flower_task_url(settings: Settings, task_id: str) -> str | None:
    """Return the address of a task in Flower. None without `PAYREADY_DASHBOARD_FLOWER_URL`."""
    if settings.dashboard_flower_url is None or task_id in _DOT_SEGMENTS:
        return None
    return f"{str(settings.dashboard_flower_url).rstrip('/')}/task/{quote(task_id, safe='', errors='replace')}"
