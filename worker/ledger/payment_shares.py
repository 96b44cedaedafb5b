"""The statement by payment: the fee share of each payment in the calls of a period. Read-only."""

from collections.abc import Collection, Iterator
from datetime import datetime
from decimal import Decimal
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import Select, bindparam, select

from worker.ledger.bulk import any_of
from worker.ledger.engine import Rows, Tx
from worker.ledger.fee_calls import raise_limits_for_report
from worker.ledger.fee_statement import from_units, refresh_costs, refresh_fee_state, sum_fee_units
from worker.ledger.tables import FEE_ENTRY, PAYMENT

entry, payment = FEE_ENTRY.c, PAYMENT.c
_ROWS_PER_FETCH = 5000
_REFRESHES_PER_QUERY = 5000
"""Refreshes whose earlier calls are read by one query."""


class PaymentShare(NamedTuple):
    """One payment's fee share of the calls of a period.

    A named tuple, because a statement has a million of them, and a frozen dataclass takes three times as long to make.
    """

    payment_id: str | None
    """None for calls that no resolved payment shares."""
    account_id: str
    refresh_id: str
    shared_by: int
    fee: Decimal
    currency: str
    state: str
    """State of the fee: posted, pending or void; `reused` for a payment without a fee."""
    saved: Decimal
    """Fee without sharing and reuse, minus the fee."""


def payment_shares_and_unshared_fees(tx: Tx, since: datetime, until: datetime) -> Iterator[PaymentShare]:
    """Yield the fee share of each payment in the calls of the period, and the calls that no payment shares, by account.

    Together they sum exactly to the fees of the calls. The shares are those of `pricing.split_share`. If a refresh has
    calls on both sides of a month's end, each month gets what its calls add: over both months a payment owes exactly
    its share of all calls.
    """
    raise_limits_for_report(tx)
    rows = tx.execute(_payments_with_costs(since, until).execution_options(yield_per=_ROWS_PER_FETCH))
    by_refresh = groupby(rows, key=_REFRESH_AND_CURRENCY)
    while refreshes := [list(of_refresh) for _, of_refresh in islice(by_refresh, _REFRESHES_PER_QUERY)]:
        shared = {payments[0][0] for payments in refreshes if len(payments) > 1 or payments[0][-1]}
        before = _fee_units_before(tx, shared, since)
        for payments in refreshes:
            refresh_id, currency, account_id, _, total, state, payment_id, reused = payments[0]
            if len(payments) == 1 and reused is False:  # most payments are so, and this is fast
                yield PaymentShare(payment_id, account_id, refresh_id, 1, from_units(total), currency, state, _NOTHING)
            else:
                yield from _shares_of_refresh(payments, before.get((refresh_id, currency), 0))


_REFRESH_AND_CURRENCY = itemgetter(0, 1)
"""Of a row of `_payments_with_costs`."""
_NOTHING = from_units(0)


def _payments_with_costs(since: datetime, until: datetime) -> Select[Any]:
    """Select the payments of each refresh in the period with its fees. First those that share them, in their order.

    A refresh without payments has one row, without a payment.
    """
    cost = refresh_costs(since, until).add_columns(refresh_fee_state().label("state")).subquery("cost")
    names = ("refresh_id", "currency", "account_id", "price", "total", "state")
    query = select(*(cost.c[name] for name in names), payment.payment_id, payment.reused).select_from(
        cost.outerjoin(PAYMENT, payment.refresh_id == cost.c.refresh_id)
    )
    place = (payment.reused, payment.resolved_at, payment.requested_at, payment.payment_id)
    return query.order_by(cost.c.account_id, cost.c.refresh_id, cost.c.currency, *place)


def _fee_units_before(tx: Tx, refresh_ids: Collection[str], since: datetime) -> dict[tuple[str, str], int]:
    """Return the fees of the refreshes' calls before this time, by refresh and currency.

    Refreshes with one payment need no such query, and the index of the refresh answers it, so it costs little however
    many months the ledger has.
    """
    if not refresh_ids:
        return {}
    rows = tx.execute(_FEE_UNITS_BEFORE, {"refresh_ids": list(refresh_ids), "since": since})
    return {(row.refresh_id, row.currency): row.units for row in rows}


_FEE_UNITS_BEFORE = (
    select(entry.refresh_id, entry.currency, sum_fee_units().label("units"))
    .where(any_of(entry.refresh_id, "refresh_ids"), entry.called_at < bindparam("since"))
    .group_by(entry.refresh_id, entry.currency)
)


def _shares_of_refresh(rows: Rows, before: int) -> Iterator[PaymentShare]:
    """Yield the shares of a refresh's payments. `before` are its fees before the period, in units."""
    refresh_id, currency, account_id, price, total, state, _, _ = rows[0]
    sharers = [payment_id for *_, payment_id, reused in rows if reused is False]
    count = len(sharers)
    if not sharers and total > 0:
        yield PaymentShare(None, account_id, refresh_id, 0, from_units(total), currency, state, _NOTHING)
    for place, payment_id in enumerate(sharers):
        fee = _share_units(before + total, count, place) - _share_units(before, count, place) if count > 1 else total
        saved = from_units(total - fee)
        yield PaymentShare(payment_id, account_id, refresh_id, count, from_units(fee), currency, state, saved)
    saved_by_reuse = from_units(price if total and not before else 0)
    for row in rows[count:]:
        if row.payment_id is not None:
            yield PaymentShare(row.payment_id, account_id, refresh_id, 0, _NOTHING, currency, "reused", saved_by_reuse)


def _share_units(total: int, count: int, place: int) -> int:
    """Return the share of `total` units of the payment at `place`, as `pricing.split_share` does."""
    return total // count + (place < total % count)
