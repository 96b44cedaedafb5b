"""Amounts of a balance pass through payready exactly, from the webhook to the outcome."""

from decimal import Decimal

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.in_process import START, MakeSystem
from webhook.events import parse
from worker import flow

numbers = st.one_of(
    st.sampled_from(["1e-7", "314.15", "9007199254740993", "-0", "1E+2", "0.1000000000000000055511151231257827"]),
    st.integers(-(10**29), 10**29).map(str),
    st.decimals(-(10**15), 10**15, places=9).map(lambda number: f"{number:f}"),
    st.floats(-1e25, 1e25)
    .filter(lambda number: abs(number) > 1e-30)
    .map(repr),  # smaller values have too many places and are quarantined
)


@settings(max_examples=25, deadline=None)
@given(values=st.tuples(numbers, numbers, numbers))
def test_outcome_has_the_exact_amounts_of_the_webhook(
    make_sqlite_system: MakeSystem, values: tuple[str, str, str]
) -> None:
    """This is true for any JSON number: no step converts it to a float."""
    names = ("available", "current", "limit")
    fields = ", ".join(f'"{name}": {number}' for name, number in zip(names, values, strict=True))
    record = (
        f'{{"id": "bal_1", "accountId": "acct_a", "at": "{START:%Y-%m-%dT%H:%M:%SZ}", "source": "REFRESH", {fields}}}'
    )
    body = f'{{"events": [{{"id": "evt_1", "type": "balance.created", "record": {record}}}]}}'
    balances = parse(body.encode(), START).balances
    with make_sqlite_system() as payready:
        payready.initiate("p1", "acct_a", amount="0.01", funds_check="disabled")
        payready.run_tasks()
        payready.queue.add(flow.ingest_events_and_resolve_payments(payready.rt, balances))
        payready.run_tasks()
        balance = payready.outcome("p1")["balance"]
    assert [Decimal(balance[name]) for name in names] == [Decimal(number) for number in values]
