"""The search for payments: pages by key, the last requested first. Read-only.

A search reads few rows, also in a ledger of millions. An index finds payments by id, by task and by account, and those
that wait, that were resolved in a period, or that have an outcome that is not delivered. Without such a condition, or
if more than `MAX_EXAMINED` payments fulfil it, a search examines at most `MAX_EXAMINED` payments in the order of their
requests, and states how far it has come.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Self

from sqlalchemy import ColumnElement, Dialect, Float, Text, and_, case, cast, func, literal, or_, select, union_all

from worker.errors import FailureReason
from worker.ledger.column_types import is_storable_text
from worker.ledger.engine import Row, Tx
from worker.ledger.payment_report import PaymentLine, find_payments
from worker.ledger.tables import IS_WAITING, OUTCOME_DELIVERY, PAYMENT
from worker.rules.states import PaymentState

MAX_EXAMINED = 10_000
"""Maximum number of payments that one search examines."""
PAGE_SIZE = 50
MAX_AMOUNT_EXPONENT = 40
"""No stored amount has more digits before or after the point."""
payment, delivery = PAYMENT.c, OUTCOME_DELIVERY.c
_PARTS_BY_ACCOUNT: Sequence[ColumnElement[bool]] = (
    IS_WAITING,
    payment.hold_until.is_not(None),
    and_(payment.resolved_at.is_not(None), payment.hold_until.is_(None)),
)
"""Conditions of the three partial indexes by account. Each payment fulfils exactly one of them."""
_UNREADABLE_JSON = r"\\u0000|\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
"""Escapes in JSON that PostgreSQL stores and cannot read: NUL, and half of a surrogate pair."""


class DeliveryProblem(StrEnum):
    """Why an outcome has not reached a task that gets it."""

    UNDELIVERED = "undelivered"
    """It is due, and delivered again by itself."""
    UNDELIVERABLE = "undeliverable"
    """Its delivery was given up."""


_DELIVERY_TESTS: Mapping[DeliveryProblem, ColumnElement[bool]] = {
    DeliveryProblem.UNDELIVERED: delivery.due_at.is_not(None),
    DeliveryProblem.UNDELIVERABLE: delivery.undeliverable.is_not(None),
}


@dataclass(frozen=True, kw_only=True)
class PaymentFilter:
    """Conditions on payments. None and empty conditions are not set."""

    payment_id: str | None = None
    task_id: str | None = None
    """Id of a Celery task that gets the outcome."""
    account_id: str | None = None
    state: PaymentState | None = None
    reason: FailureReason | None = None
    amount: Decimal | None = None
    """The exact amount, in any currency."""
    since: datetime | None = None
    """Earliest time of the request."""
    until: datetime | None = None
    """End of the time of the request, exclusive."""
    resolved_since: datetime | None = None
    """Earliest time of the resolution. A waiting payment has none."""
    resolved_until: datetime | None = None
    """End of the time of the resolution, exclusive."""
    delivery: DeliveryProblem | None = None
    """Why the outcome has not reached one of its tasks."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Keys on the first level of the job's metadata, with their values as text, such as `5`, `true` or `A-17`."""


@dataclass(frozen=True, kw_only=True)
class PageKey:
    """The place of a payment in the order of a search. A page begins after it."""

    requested_at: datetime
    payment_id: str

    def __str__(self) -> str:
        return f"{self.requested_at.isoformat().replace('+00:00', 'Z')}/{self.payment_id}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the text of a key.

        Raises:
            ValueError: it is not the text of a key.
        """
        at, separator, payment_id = text.partition("/")
        try:
            requested_at = datetime.fromisoformat(at)
            if separator and requested_at.tzinfo is not None:
                return cls(requested_at=requested_at.astimezone(UTC), payment_id=payment_id)
        except (ValueError, OverflowError):
            pass
        raise ValueError("must be the key that the page before has printed, such as 2026-11-22T12:00:00Z/pay_1")


@dataclass(frozen=True, kw_only=True)
class PaymentPage:
    """A page of a search."""

    payments: list[PaymentLine]
    next_page: PageKey | None
    """Where the next page begins. None after the last page."""
    searched_back_to: datetime | None
    """Time of the request of the last payment that was examined, if the search stopped at `MAX_EXAMINED` payments.
    None if the page is full, or the search is complete."""


def search_payments(
    tx: Tx, conditions: PaymentFilter, *, after: PageKey | None = None, limit: int = PAGE_SIZE
) -> PaymentPage:
    """Return up to `limit` matching payments with their fee shares, the last requested first.

    `after` is the `next_page` of the page before. `limit` is at most `MAX_EXAMINED`.
    """
    if not _can_match(conditions, after):
        return PaymentPage(payments=[], next_page=None, searched_back_to=None)
    parts = _indexed_parts(conditions)
    if parts and _are_few(tx, parts):
        rows, last_examined = _find_by_index(tx, parts, conditions, after, limit + 1), None
    else:
        rows, last_examined = _find_by_time(tx, conditions, after, limit + 1)
    is_full = len(rows) > limit
    last = rows[limit - 1] if is_full else last_examined
    return PaymentPage(
        payments=find_payments(tx, [row.payment_id for row in rows[:limit]]),
        next_page=PageKey(requested_at=last.requested_at, payment_id=last.payment_id) if last else None,
        searched_back_to=last_examined.requested_at if last_examined and not is_full else None,
    )


def _can_match(conditions: PaymentFilter, after: PageKey | None) -> bool:
    """Whether a stored payment can match."""
    texts = [conditions.payment_id, conditions.task_id, conditions.account_id, after and after.payment_id]
    texts += [*conditions.metadata.keys(), *conditions.metadata.values()]
    amount = conditions.amount
    return all(is_storable_text(text) for text in texts if text) and (
        amount is None or (amount.is_finite() and abs(amount.adjusted()) < MAX_AMOUNT_EXPONENT)
    )


def _indexed_parts(conditions: PaymentFilter) -> Sequence[ColumnElement[bool]]:
    """Return disjoint conditions, each with an index, of which one is true for every matching payment. May be empty."""
    if conditions.payment_id is not None:
        return [payment.payment_id == conditions.payment_id]
    if conditions.task_id is not None:
        return [payment.payment_id == _payment_of_task(conditions.task_id)]
    if conditions.account_id is not None:
        return [and_(payment.account_id == conditions.account_id, part) for part in _PARTS_BY_ACCOUNT]
    if conditions.state == PaymentState.WAITING:
        return [payment.resolved_at.is_(None)]
    if conditions.delivery is not None:
        return [payment.payment_id.in_(_payments_with(conditions.delivery))]
    return [] if conditions.resolved_since is None else [and_(*_resolution_bounds(payment, conditions))]


def _payments_with(problem: DeliveryProblem) -> Any:
    return select(delivery.payment_id).where(_DELIVERY_TESTS[problem])


def _resolution_bounds(column: Any, conditions: PaymentFilter) -> Iterator[ColumnElement[bool]]:
    if conditions.resolved_since is not None:
        yield column.resolved_at >= conditions.resolved_since
    if conditions.resolved_until is not None:
        yield column.resolved_at < conditions.resolved_until


def _payment_of_task(task_id: str) -> Any:
    return select(delivery.payment_id).where(delivery.task_id == task_id).scalar_subquery()


def _are_few(tx: Tx, parts: Sequence[ColumnElement[bool]]) -> bool:
    """Whether at most `MAX_EXAMINED` payments fulfil the parts. Of more, a search by time soon finds enough."""
    ids = union_all(*(select(payment.payment_id).where(part) for part in parts)).limit(MAX_EXAMINED + 1).subquery()
    return bool(tx.scalar(select(func.count()).select_from(ids)) <= MAX_EXAMINED)


def _find_by_index(
    tx: Tx, parts: Sequence[ColumnElement[bool]], conditions: PaymentFilter, after: PageKey | None, limit: int
) -> Sequence[Row[Any]]:
    tests = [*_tests(payment, conditions, tx.dialect), *_bounds(payment, conditions, after)]
    matching = union_all(*(select(payment.requested_at, payment.payment_id).where(part, *tests) for part in parts))
    # Otherwise PostgreSQL may read the payments by time until it has found enough of them, however few they are.
    found = matching.cte("found").prefix_with("MATERIALIZED")
    return tx.execute(select(found).order_by(found.c.requested_at.desc(), found.c.payment_id).limit(limit)).all()


def _find_by_time(
    tx: Tx, conditions: PaymentFilter, after: PageKey | None, limit: int
) -> tuple[Sequence[Row[Any]], Row[Any] | None]:
    """Examine up to `MAX_EXAMINED` payments. Return the first matching ones, and the last examined if more follow."""
    in_order = select(PAYMENT).where(*_bounds(payment, conditions, after)).order_by(*_ORDER)
    examined = in_order.limit(MAX_EXAMINED).subquery()
    query = select(examined.c.requested_at, examined.c.payment_id)
    query = query.where(*_tests(examined.c, conditions, tx.dialect))
    rows = tx.execute(query.order_by(examined.c.requested_at.desc(), examined.c.payment_id).limit(limit)).all()
    if len(rows) == limit:
        return rows, None
    keys = in_order.with_only_columns(payment.requested_at, payment.payment_id)
    return rows, tx.execute(keys.offset(MAX_EXAMINED - 1).limit(1)).one_or_none()


_ORDER = (payment.requested_at.desc(), payment.payment_id)


def _bounds(column: Any, conditions: PaymentFilter, after: PageKey | None) -> Iterator[ColumnElement[bool]]:
    """Yield the conditions on the time of the request: the index by time finds where to begin and where to end."""
    if conditions.since is not None:
        yield column.requested_at >= conditions.since
    if conditions.until is not None:
        yield column.requested_at < conditions.until
    if after is not None:
        yield column.requested_at <= after.requested_at
        yield or_(column.requested_at < after.requested_at, column.payment_id > after.payment_id)


def _tests(column: Any, conditions: PaymentFilter, dialect: Dialect) -> Iterator[ColumnElement[bool]]:
    """Yield the other conditions, on these columns."""
    for name in ("payment_id", "account_id", "state", "reason"):
        value = getattr(conditions, name)
        if value is not None:
            yield getattr(column, name) == value
    if conditions.task_id is not None:
        yield column.payment_id == _payment_of_task(conditions.task_id)
    if conditions.delivery is not None:
        yield column.payment_id.in_(_payments_with(conditions.delivery))
    yield from _resolution_bounds(column, conditions)
    is_sqlite = dialect.name == "sqlite"
    if conditions.amount is not None:
        yield (
            cast(column.amount, Float) == float(conditions.amount) if is_sqlite else column.amount == conditions.amount
        )
    metadata_equals = _metadata_equals_on_sqlite if is_sqlite else _metadata_equals_on_postgresql
    for key, value in conditions.metadata.items():
        yield metadata_equals(column.job, key, value)


def _metadata_equals_on_postgresql(job: Any, key: str, value: str) -> ColumnElement[bool]:
    stored = cast(job, Text)
    readable = case((stored.op("!~")(_UNREADABLE_JSON), func.json_extract_path_text(job, "metadata", key)), else_=None)
    if not re.fullmatch(r"[\w .:@+-]+", value, re.ASCII):  # JSON may have escapes for it
        return readable == value
    # To look for the value takes a tenth of the time that PostgreSQL needs to parse JSON.
    return case((func.strpos(stored, value) > 0, readable), else_=None) == value


def _metadata_equals_on_sqlite(job: Any, key: str, value: str) -> ColumnElement[bool]:
    entry = func.json_each(job, "$.metadata").table_valued("key", "value", "type")
    is_boolean = entry.c.type.in_(("true", "false"))
    text = case((is_boolean, entry.c.type), else_=cast(entry.c.value, Text))
    return select(literal(1)).where(entry.c.key == key, text == value).exists()
