"""The page Audit: which user requested which action, and what it did."""

from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dashboard.page_rendering import render
from dashboard.page_requests import runtime_of
from worker.ledger import audit
from worker.ledger.engine import read_snapshot
from worker.ledger.metrics_queries import set_short_timeout

PAGE_SIZE = 50
MAX_AUDIT_ID = 2**63 - 1


def show_audit(request: Request) -> Response:
    """Show a page of actions, newest first."""
    user_name, subject, before = (request.query_params.get(name, "").strip() for name in ("user", "subject", "before"))
    filters = {name: value for name, value in (("user", user_name), ("subject", subject)) if value}
    before_id = _audit_id(before)
    if before and before_id is None:
        problem = "before: must be the number of an action; leave it out for the newest actions"
        return _page(request, filters, entries=[], next_page="", problem=problem)
    with read_snapshot(runtime_of(request).engine) as tx:
        set_short_timeout(tx)
        found = audit.newest_entries(
            tx, user_name=user_name or None, subject=subject or None, before_id=before_id, limit=PAGE_SIZE + 1
        )
    entries = found[:PAGE_SIZE]
    older = urlencode({**filters, "before": entries[-1].audit_id}) if len(found) > PAGE_SIZE else ""
    return _page(request, filters, entries=entries, next_page=older and f"/audit?{older}", problem="")


def _page(
    request: Request,
    filters: dict[str, str],
    *,
    entries: list[audit.AuditEntry],
    next_page: str,
    problem: str,
) -> Response:
    values = {"user_filter": filters.get("user", ""), "subject_filter": filters.get("subject", "")}
    status_code = 400 if problem else 200
    return render(
        request,
        "audit.html",
        status_code=status_code,
        entries=entries,
        next_page=next_page,
        problem=problem,
        is_filtered=bool(filters),
        **values,
    )


def _audit_id(text: str) -> int | None:
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_AUDIT_ID))
    return min(int(text), MAX_AUDIT_ID) if is_number else None


ROUTES = [Route("/audit", show_audit)]
