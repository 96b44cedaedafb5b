"""Rendering of pages with Jinja2.

Ids, metadata and details are hostile input: every expression of a template is escaped for HTML, and characters that are
not printable, such as those that turn the direction of text, are shown as escapes.
"""

from datetime import timedelta
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Undefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse

from config.escaping import escape_unprintable
from config.version import payready_version
from dashboard.charts import short_duration
from dashboard.page_links import payment_path, payments_path
from dashboard.page_requests import runtime_of
from dashboard.time_histograms import bin_label
from worker.rules.decimals import amount_with_currency_text, count_text
from worker.rules.times import utc_time_text

FOLDER = Path(__file__).parent
NAVIGATION = (
    ("/", "Now"),
    ("/payments", "Payments"),
    ("/provider", "Provider"),
    ("/fees", "Fees"),
    ("/dead-letters", "Dead letters"),
    ("/quarantine", "Quarantine"),
    ("/audit", "Audit"),
)
"""Path and title of the pages that each page links."""


def render(request: Request, template: str, *, status_code: int = 200, **values: Any) -> HTMLResponse:
    """Return the page of a template. It has the values, the user, the navigation and the time of the page."""
    html = (
        _environment()
        .get_template(template)
        .render(
            path=request.scope["path"],
            navigation=NAVIGATION,
            user=getattr(request.state, "user", None),
            csrf_token=getattr(request.state, "csrf_token", ""),
            now=runtime_of(request).clock(),
            **values,
        )
    )
    return HTMLResponse(html, status_code=status_code)


def render_fragment(template: str, **values: Any) -> str:
    """Return the HTML of a part of a page."""
    return _environment().get_template(template).render(**values)


def compile_templates() -> None:
    """Compile all templates, so that the first reader of a page does not wait for it: up to 0.1 s a page."""
    for name in _environment().list_templates():
        _environment().get_template(name)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters.update(utc=utc_time_text, duration=duration_text, amount=amount_with_currency_text)
    environment.filters.update(payment_path=payment_path, short=short_duration, bin_label=bin_label, counted=count_text)
    environment.globals.update(version=payready_version(), payments_path=payments_path)
    return environment


def _printable(value: Any) -> Any:
    """Return a value of an expression without characters that are not printable."""
    if isinstance(value, Markup | Undefined):
        return value
    return "" if value is None else escape_unprintable(str(value), keep="\n")


def duration_text(duration: timedelta | float | Decimal) -> str:
    """Return a duration in its two largest units, such as `4 min 10 s`. A number is of seconds."""
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else float(duration)
    sign, seconds = ("-" if seconds < 0 else ""), abs(seconds)
    if seconds < 1:
        return f"{sign}{seconds * 1000:.0f} ms"
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{sign}{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_min = divmod(minutes, 60)
    days, rest_h = divmod(hours, 24)
    if days:
        return f"{sign}{days} d {rest_h} h"
    return f"{sign}{hours} h {rest_min} min" if hours else f"{sign}{minutes} min {rest_s} s"
