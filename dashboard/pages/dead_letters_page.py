"""The pages of dead letters: list, one message, and the actions requeue and delete."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Self

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from dashboard.auditing import audited
from dashboard.list_pages import (
    PAGE_SIZE,
    Selection,
    counts_of,
    parse_position,
    path_id,
    position_text,
    selection_of,
)
from dashboard.page_rendering import render
from dashboard.page_requests import operator_form, require_operator, runtime_of, user_of
from tasks.celery_errors import CeleryUnavailable
from tasks.message_requeue import NotRequeueable, decoded_message_and_body, open_message_sender, send_then_delete
from worker import flow
from worker.ledger import dead_letters
from worker.ledger.engine import read_snapshot
from worker.ledger.metrics_queries import set_short_timeout
from worker.rules.unhandled_messages import DeadLetterReason
from worker.runtime import Runtime

ACTIONS = {"requeue": "Requeue", "delete": "Delete"}


def show_list(request: Request) -> Response:
    """Show dead letters without their messages, the newest first."""
    reason = _reason_of(request.query_params.get("reason") or None)
    before = parse_position(request.query_params.get("before"))
    with read_snapshot(runtime_of(request).engine) as tx:
        set_short_timeout(tx)
        letters = dead_letters.newest(tx, PAGE_SIZE + 1, before=before, reason=reason)
    page = letters[:PAGE_SIZE]
    return render(
        request,
        "dead_letters.html",
        letters=page,
        reason=reason,
        reasons=list(DeadLetterReason),
        is_first_page=before is None,
        next_position=position_text(page[-1].stored_at, page[-1].dead_letter_id) if len(letters) > PAGE_SIZE else None,
        done=request.query_params.get("done"),
        counts=counts_of(request, ("changed", "refused")),
    )


def _reason_of(text: str | None) -> DeadLetterReason | None:
    try:
        return None if text is None else DeadLetterReason(text)
    except ValueError:
        raise HTTPException(400, f"reason must be one of {', '.join(DeadLetterReason)}") from None


def show_letter(request: Request) -> Response:
    """Show one dead letter with its message as text. The message may be confidential."""
    dead_letter_id = path_id(request, "dead_letter_id")
    with read_snapshot(runtime_of(request).engine) as tx:
        set_short_timeout(tx)
        letter = dead_letters.find_letter(tx, dead_letter_id)
    if letter is None:
        raise HTTPException(404, "there is no such dead letter; it was requeued or deleted, or is older than 30 days")
    message, body = decoded_message_and_body(letter)
    return render(request, "dead_letter.html", letter=letter, message=message, body=body)


def confirm(request: Request) -> Response:
    """Say what an action will do, and ask."""
    require_operator(request)
    action = _action_of(request)
    ids, reason = request.query_params.getlist("id"), _reason_of(request.query_params.get("reason") or None)
    if bool(ids) == (reason is not None):
        raise HTTPException(400, "select dead letters, or a reason")
    return render(
        request, "dead_letters_confirm.html", action=action, title=ACTIONS[action], ids=ids[:PAGE_SIZE], reason=reason
    )


def _action_of(request: Request) -> str:
    action: str = request.path_params["action"]
    if action not in ACTIONS:
        raise HTTPException(404, "there is no such action")
    return action


async def act(request: Request) -> Response:
    """Requeue or delete dead letters, by ids or by reason."""
    form = await operator_form(request)
    action = _action_of(request)
    try:
        result = await run_in_threadpool(_act, request, action, form)
    except CeleryUnavailable as error:
        return render(request, "error.html", status_code=503, problem=str(error))
    return RedirectResponse(
        f"/dead-letters?done={action}&changed={result.changed}&refused={len(result.refused)}", status_code=303
    )


@dataclass(frozen=True, kw_only=True)
class _Result:
    changed: int = 0
    refused: Sequence[str] = ()

    def __add__(self, other: Self) -> Self:
        return replace(self, changed=self.changed + other.changed, refused=[*self.refused, *other.refused])

    def __str__(self) -> str:
        text = f"changed {self.changed}"
        return f"{text}; refused {'; '.join(self.refused[:5])}" if self.refused else text


def _act(request: Request, action: str, form: FormData) -> _Result:
    rt, selected = runtime_of(request), selection_of(form)
    pages = [selected] if selected.ids else _pages_of_reason(rt, selected, _reason_of(selected.reason))
    return sum((_act_on_page(request, action, page) for page in pages), _Result())


def _pages_of_reason(rt: Runtime, selected: Selection, reason: DeadLetterReason | None) -> Iterator[Selection]:
    """Yield the dead letters of a reason in pages, so that the audit has the id of each."""
    ids = flow.every_dead_letter_id(rt, reason)
    while page := list(islice(ids, PAGE_SIZE)):
        yield replace(selected, ids=page)


def _act_on_page(request: Request, action: str, page: Selection) -> _Result:
    rt = runtime_of(request)
    return audited(
        rt,
        user_of(request),
        action=f"dead_letter.{action}",
        subject=page.subject,
        detail=page.detail,
        do=lambda: (_requeue if action == "requeue" else _delete)(rt, page.ids),
    )


def _requeue(rt: Runtime, ids: Iterable[str]) -> _Result:
    """Send messages to their queues again, each once. A dead letter that cannot be requeued stays."""
    requeued, refused = 0, list[str]()
    with open_message_sender(rt.settings) as sender:
        for dead_letter_id in ids:
            try:
                send_then_delete(rt, sender, dead_letter_id)
                requeued += 1
            except NotRequeueable as error:
                refused.append(f"{dead_letter_id}: {error}")
    return _Result(changed=requeued, refused=refused)


def _delete(rt: Runtime, ids: Iterable[str]) -> _Result:
    return _Result(changed=sum(flow.delete_dead_letters(rt, [each]) for each in ids))


ROUTES = [
    Route("/dead-letters", show_list),
    Route("/dead-letters/confirm/{action}", confirm),
    Route("/dead-letters/actions/{action}", act, methods=["POST"]),
    Route("/dead-letters/{dead_letter_id}", show_letter),
]
