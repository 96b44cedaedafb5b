"""The search for payments, and the field of each page that finds one payment by an id."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from dashboard.page_links import payment_path, payments_path
from dashboard.page_rendering import render
from dashboard.page_requests import runtime_of
from worker.errors import FailureReason
from worker.ledger import archived_months
from worker.ledger.column_types import is_storable_text
from worker.ledger.engine import Tx, read_snapshot
from worker.ledger.metrics_queries import set_short_timeout
from worker.ledger.payment_search import (
    MAX_EXAMINED,
    PAGE_SIZE,
    DeliveryProblem,
    PageKey,
    PaymentFilter,
    search_payments,
)
from worker.rules.decimals import parse_positive_decimal
from worker.rules.states import PaymentState
from worker.rules.times import parse_utc_time


def _parse_state(text: str) -> PaymentState:
    try:
        return PaymentState(text)
    except ValueError:
        raise ValueError(f"must be one of {', '.join(PaymentState)}") from None


def _parse_reason(text: str) -> FailureReason:
    try:
        return FailureReason(text)
    except ValueError:
        raise ValueError(f"must be one of {', '.join(FailureReason)}") from None


def _parse_delivery(text: str) -> DeliveryProblem:
    try:
        return DeliveryProblem(text)
    except ValueError:
        raise ValueError(f"must be one of {', '.join(DeliveryProblem)}") from None


_PARSERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "payment_id": ("payment_id", str),
    "account": ("account_id", str),
    "task": ("task_id", str),
    "state": ("state", _parse_state),
    "reason": ("reason", _parse_reason),
    "amount": ("amount", parse_positive_decimal),
    "since": ("since", parse_utc_time),
    "until": ("until", parse_utc_time),
    "resolved_since": ("resolved_since", parse_utc_time),
    "resolved_until": ("resolved_until", parse_utc_time),
    "delivery": ("delivery", _parse_delivery),
}
"""Fields of the form, each with the condition that it sets and how it is parsed."""
_METADATA_FIELDS = ("metadata_key", "metadata_value")
FIELDS = (*_PARSERS, *_METADATA_FIELDS)


@dataclass(frozen=True, kw_only=True)
class SearchForm:
    """The fields of a search as they were sent, and what they mean."""

    fields: Mapping[str, str]
    """Fields that are not empty, without spaces around them."""
    conditions: PaymentFilter
    """The conditions of the fields without problems."""
    after: PageKey | None
    problems: Mapping[str, str]
    """Fields that are wrong, with what to write."""

    def next_path(self, after: PageKey) -> str:
        """Return the path of the page that begins after this key."""
        return payments_path(**self.fields, after=str(after))


def parse_search(query: QueryParams) -> SearchForm:
    """Parse the fields of a search. Nothing is raised: wrong fields are in `problems`."""
    given = {name: value.strip() for name, value in query.items() if value.strip()}
    fields = {name: given[name] for name in FIELDS if name in given}
    problems = {name: "is not a field of this search" for name in given if name not in (*FIELDS, "after")}
    conditions: dict[str, Any] = {}
    for name, (condition, parse) in _PARSERS.items():
        if name in fields:
            try:
                conditions[condition] = parse(fields[name])
            except ValueError as error:
                problems[name] = str(error)
    after = None
    try:
        after = PageKey.parse(given["after"]) if "after" in given else None
    except ValueError as error:
        problems["after"] = str(error)
    missing = [name for name in _METADATA_FIELDS if name not in fields]
    if not missing:
        conditions["metadata"] = {fields["metadata_key"]: fields["metadata_value"]}
    elif len(missing) == 1:
        problems[missing[0]] = "must be given too: a search for metadata needs its key and its value"
    return SearchForm(fields=fields, conditions=PaymentFilter(**conditions), after=after, problems=problems)


def show_payments(request: Request) -> Response:
    """Show a page of a search."""
    form, rt = parse_search(request.query_params), runtime_of(request)
    page = None
    if not form.problems:
        with read_snapshot(rt.engine) as tx:
            set_short_timeout(tx)
            page = search_payments(tx, form.conditions, after=form.after, limit=PAGE_SIZE)
    return render(
        request,
        "payments.html",
        status_code=400 if form.problems else 200,
        form=form,
        page=page,
        next_path=form.next_path(page.next_page) if page and page.next_page else None,
        max_examined=MAX_EXAMINED,
        states=list(PaymentState),
        reasons=list(FailureReason),
        delivery_problems=list(DeliveryProblem),
    )


def find_payment(request: Request) -> Response:
    """Redirect to the payment with this id, or of the task with this id; else to the payments of the account."""
    text = request.query_params.get("q", "").strip()
    with read_snapshot(runtime_of(request).engine) as tx:
        set_short_timeout(tx)
        path = _path_of_match(tx, text) if text else payments_path()
    return RedirectResponse(path or payment_path(text), status_code=303)


def _path_of_match(tx: Tx, text: str) -> str | None:
    for conditions in (PaymentFilter(payment_id=text), PaymentFilter(task_id=text)):
        for line in search_payments(tx, conditions, limit=1).payments:
            return payment_path(line.payment_id)
    if is_storable_text(text) and archived_months.month_with_payment(tx, text):
        return payment_path(text)
    is_account = search_payments(tx, PaymentFilter(account_id=text), limit=1).payments
    return payments_path(account=text) if is_account else None


ROUTES = [Route("/payments", show_payments), Route("/find", find_payment)]
