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
    st.decimals(-(10**15), 10**15, places=9).map(lambda figure: f"{figure:f}"),
    st.floats(-1e25, 1e25).filter(lambda figure: abs(figure) > 1e-30).map(repr),  # less has too many places: set aside
)


@settings(max_examples=25, deadline=None)
@given(figures=st.tuples(numbers, numbers, numbers))
def test_a_figure_comes_out_as_the_provider_wrote_it(made_on_sqlite: MakeSystem, figures: tuple[str, str, str]) -> None:
    """Any JSON number, through the webhook's reader, the ledger and the verdict, to the outcome: never a float."""
    names = ("available", "current", "limit")
    cells = ", ".join(f'"{name}": {figure}' for name, figure in zip(names, figures, strict=True))
    record = (
        f'{{"id": "bal_1", "accountId": "acct_a", "at": "{START:%Y-%m-%dT%H:%M:%SZ}", "source": "REFRESH", {cells}}}'
    )
    body = f'{{"events": [{{"id": "evt_1", "type": "balance.created", "record": {record}}}]}}'
    balances = parse(body.encode(), START).balances
    with made_on_sqlite() as payready:
        payready.initiate("p1", "acct_a", amount="0.01", funds_check="disabled")
        payready.run_tasks()
        payready.queue.merge(flow.ingest_events_and_resolve_payments(payready.rt, balances))
        payready.run_tasks()
        sheet = payready.outcome("p1")["balance"]
    assert [Decimal(sheet[name]) for name in names] == [Decimal(figure) for figure in figures]
