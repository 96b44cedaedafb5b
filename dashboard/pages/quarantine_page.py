"""The pages of the quarantine: list, one event, and the actions replay and delete."""

from collections import Counter
from collections.abc import Iterable

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from dashboard.auditing import audited
from dashboard.list_pages import PAGE_SIZE, counts_of, parse_position, path_id, position_text, selection_of
from dashboard.page_rendering import render
from dashboard.page_requests import operator_form, require_operator, runtime_of, user_of
from webhook.quarantine_replay import replay_only_balances
from worker import flow
from worker.ledger import quarantine
from worker.ledger.engine import read_snapshot
from worker.ledger.metrics_queries import set_short_timeout
from worker.runtime import Runtime

ACTIONS = {"replay": "Replay", "delete": "Delete"}
RESULTS = ("applied", "irrelevant", "still_unparseable", "deleted", "missing")
NOT_ENQUEUED = "not_enqueued"
"""Applied events of which no worker was notified: the sweep applies their balances."""


def show_list(request: Request) -> Response:
    """Show quarantined events without their content, the newest first."""
    before = parse_position(request.query_params.get("before"))
    with read_snapshot(runtime_of(request).engine) as tx:
        set_short_timeout(tx)
        events = quarantine.newest_summaries(tx, PAGE_SIZE + 1, before=before)
    page = events[:PAGE_SIZE]
    return render(
        request,
        "quarantine.html",
        events=page,
        is_first_page=before is None,
        next_position=position_text(page[-1].received_at, page[-1].quarantine_id) if len(events) > PAGE_SIZE else None,
        results=counts_of(request, RESULTS),
        not_enqueued=counts_of(request, (NOT_ENQUEUED,)).get(NOT_ENQUEUED, 0),
    )


def show_event(request: Request) -> Response:
    """Show one event with its content as text. It may be confidential."""
    with read_snapshot(runtime_of(request).engine) as tx:
        set_short_timeout(tx)
        event = quarantine.find(tx, path_id(request, "quarantine_id"))
    if event is None:
        raise HTTPException(404, "there is no such event; it was replayed or deleted, or is older than 30 days")
    content = event.event.decode(errors="backslashreplace")
    return render(request, "quarantined_event.html", event=event, content=content)


def confirm(request: Request) -> Response:
    """Say what an action will do, and ask."""
    require_operator(request)
    action, ids = _action_of(request), request.query_params.getlist("id")
    if not ids:
        raise HTTPException(400, "select events")
    return render(request, "quarantine_confirm.html", action=action, title=ACTIONS[action], ids=ids[:PAGE_SIZE])


def _action_of(request: Request) -> str:
    action: str = request.path_params["action"]
    if action not in ACTIONS:
        raise HTTPException(404, "there is no such action")
    return action


async def act(request: Request) -> Response:
    """Replay or delete events by their ids."""
    form = await operator_form(request)
    counts = await run_in_threadpool(_act, request, _action_of(request), form)
    return RedirectResponse(
        "/quarantine?" + "&".join(f"{name}={count}" for name, count in counts.items()), status_code=303
    )


def _act(request: Request, action: str, form: FormData) -> Counter[str]:
    rt, selected = runtime_of(request), selection_of(form)
    if not selected.ids:
        raise HTTPException(400, "select events")
    return audited(
        rt,
        user_of(request),
        action=f"quarantine.{action}",
        subject=selected.subject,
        detail=selected.detail,
        do=lambda: (_replay if action == "replay" else _delete)(rt, selected.ids),
        result=lambda counts: ", ".join(f"{name} {count}" for name, count in counts.items()),
    )


def _replay(rt: Runtime, ids: Iterable[str]) -> Counter[str]:
    """Parse events again, as the command line does. An event that this version cannot parse stays."""
    counts: Counter[str] = Counter()
    for quarantine_id in ids:
        with read_snapshot(rt.engine) as tx:
            event = quarantine.find(tx, quarantine_id)
        if event is None:
            counts["missing"] += 1
            continue
        replay = replay_only_balances(rt, event)
        counts[replay.result.value] += 1
        if replay.problem is not None:
            counts[NOT_ENQUEUED] += 1
    return counts


def _delete(rt: Runtime, ids: Iterable[str]) -> Counter[str]:
    return Counter(deleted=flow.delete_quarantined(rt, list(ids)))


ROUTES = [
    Route("/quarantine", show_list),
    Route("/quarantine/confirm/{action}", confirm),
    Route("/quarantine/actions/{action}", act, methods=["POST"]),
    Route("/quarantine/{quarantine_id}", show_event),
]
