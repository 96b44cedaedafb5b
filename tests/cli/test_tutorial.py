"""The output that the tutorial quotes is what the commands print. Ids, times and durations are not compared."""

import re
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import typer
from rich.console import Console, RenderableType

from cli import payment_actions, render_payments, run_dev_stack, statement_tables
from demo.demo_plan import DEMO_JOBS
from demo.dev_stack import FLOWER_LOGIN, DevStack
from demo.processes import ROOT
from tests.cli.conftest import NOON
from worker.errors import FailureReason, PaymentNotReady
from worker.ledger.balance_report import BalanceLine
from worker.ledger.fee_statement import Savings, StatementLine
from worker.ledger.payment_report import (
    CallLine,
    DeliveryLine,
    FundsHoldLine,
    PaymentFee,
    PaymentLine,
    PaymentTimeline,
    RefreshLine,
)
from worker.ledger.payment_situation import explain_payment
from worker.reports import statement_report
from worker.rules.pricing import EntryState
from worker.rules.statement_period import parse_period
from worker.rules.states import PaymentState

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
PATTERNS = (
    (r"\b(call|bal|evt|ref)_\w+", r"\1_ID"),
    (r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "TASK"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?Z", "TIME"),
    (r"\d+\.\d+ s\b", "SECONDS"),
    (r"sqlite:////\S+/\.run", "sqlite:///ROOT/.run"),
    (r" +", " "),
)
DIME = Decimal("0.100000")


def comparable_lines(text: str) -> list[str]:
    """Return the lines that are not empty, without what differs from run to run."""
    for pattern, replacement in PATTERNS:
        text = re.sub(pattern, replacement, text)
    return [line.strip() for line in text.splitlines() if line.strip() not in ("", "...")]


def quoted(first_words: str) -> list[str]:
    """Return the block of output in the tutorial that begins with these words."""
    [block] = [
        block for block in re.findall(r"```text\n(.*?)```", TUTORIAL, re.DOTALL) if block.startswith(first_words)
    ]
    return comparable_lines(block)


def printed(what: RenderableType) -> list[str]:
    """Return the output for this, on a wide terminal."""
    file = StringIO()
    Console(file=file, width=200).print(what, highlight=False)
    return comparable_lines(file.getvalue())


def printed_history(history: PaymentTimeline, now: datetime) -> list[str]:
    """Return the output of `payment show` at this time."""
    return printed(render_payments.payment_timeline(history, explain_payment(history, now), now))


def seconds(after: float) -> datetime:
    """Return a time after the first job."""
    return NOON + timedelta(seconds=after)


def payment(payment_id: str, account_id: str, state: PaymentState, at: datetime, **fields: Any) -> PaymentLine:
    """Return a payment in a list."""
    none: dict[str, Any] = dict.fromkeys(("verdict", "reason", "amount", "resolved_at", "refresh_id", "fee"))
    return PaymentLine(
        payment_id=payment_id,
        account_id=account_id,
        state=state,
        requested_at=at,
        deadline=at + timedelta(seconds=120),
        **{**none, "currency": "USD", "reused": False, **fields},
    )


def timeline(line: PaymentLine, amount: str, available: str, funds_held: str | None = None) -> PaymentTimeline:
    """Return the history of a payment whose account has 500.00 USD, of which `funds_held` was released before."""
    held_text = f"; {funds_held} USD is held for 1 released payment whose outcome is not delivered yet"
    return PaymentTimeline(
        payment=replace(line, amount=Decimal(amount)),
        job={"amount": amount},
        outcome={"detail": f"needed {amount} USD, available {available} USD{held_text if funds_held else ''}"},
        funds_calculation={
            "amount": amount,
            "needed": amount,
            "available": "500.00",
            "held": funds_held,
            "held_count": 1 if funds_held else 0,
            "held_until": None,
            "available_after_holds": available,
            "currency": "USD",
        },
        refresh=RefreshLine(refresh_id="ref_1", state="answered", called_at=NOON, deferral_count=0, last_error=None),
        calls=[
            CallLine(
                call_id="call_1",
                called_at=seconds(0.01),
                state=EntryState.POSTED,
                price=DIME,
                currency="USD",
                price_list="2026-11-22",
                finalized_at=seconds(0.02),
                evidence={"status": 202},
            )
        ],
        balance=BalanceLine(
            balance_id="bal_1",
            event_id="evt_1",
            source="REFRESH",
            at=seconds(3),
            as_of=seconds(3),
            received_at=seconds(3),
            available=Decimal("500.0"),
            current=None,
            limit=None,
            refresh_id="ref_1",
        ),
        unapplied_balances=[],
        rejected_balances=[],
        unattributed_balances=[],
        arrived_balance_count=0,
        funds_hold=(
            FundsHoldLine(until=seconds(86_404), after_delivery_s=86_400)
            if line.state == PaymentState.RELEASED
            else None
        ),
        deliveries=[
            DeliveryLine(
                task_id="7b52e632-5bcf-409a-b452-06593aacd378",
                delivered_at=seconds(4),
                undeliverable=None,
                callbacks=[],
            ),
        ],
    )


def fee(amount: str, shared_by: int) -> PaymentFee:
    """Return a posted share of the fee of one call."""
    share = Decimal(amount)
    return PaymentFee(amount=share, currency="USD", state=EntryState.POSTED, shared_by=shared_by, total=DIME)


def test_tutorial_quotes_addresses_that_up_prints() -> None:
    """The tutorial leaves out the last lines."""
    ports, folder = run_dev_stack.PORTS, run_dev_stack.RUN_FOLDER
    stack = SimpleNamespace(
        web_url=f"http://127.0.0.1:{ports.web}",
        dashboard_url=f"http://127.0.0.1:{ports.dashboard}",
        flower_url=f"http://127.0.0.1:{ports.flower}",
        simulator_url=f"http://127.0.0.1:{ports.simulator}",
        redis_url=f"redis://127.0.0.1:{ports.valkey}/0",
        database_url=f"sqlite:///{folder}/payready.db",
        metrics_urls={},
        processes=SimpleNamespace(folder=folder),
    )
    file = StringIO()
    run_dev_stack.print_addresses_and_examples(Console(file=file, width=200), cast(DevStack, stack), Path("env"))
    lines = quoted("payready is up.")
    assert comparable_lines(file.getvalue())[: len(lines)] == lines
    assert "log in as `{}`, password `{}`".format(*FLOWER_LOGIN.split(":")) in TUTORIAL
    assert all(example in TUTORIAL for example in run_dev_stack.EXAMPLES)


def test_tutorial_quotes_released_payment() -> None:
    """Its outcome and its history."""
    outcome = {"payment_id": "pay_1", "verdict": "sufficient", "waited_ms": 3056}
    outcome["fee"] = {"amount": "0.100000", "currency": "USD", "state": "posted"}
    assert comparable_lines(render_payments.released_text(outcome)) == quoted("pay_1 released")
    fields = {"verdict": "sufficient", "resolved_at": seconds(3.1), "refresh_id": "ref_1", "fee": fee("0.100000", 1)}
    line = payment("pay_1", "acct_slow01", PaymentState.RELEASED, NOON, **fields)
    history = timeline(line, "25.00", available="500.00")
    assert printed_history(history, seconds(5)) == quoted("pay_1  acct_slow01")


def test_tutorial_quotes_failed_payment(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status is the one that the tutorial names."""
    error = PaymentNotReady(FailureReason.INSUFFICIENT_FUNDS, "needed 25.00 USD, available 1.00 USD")
    with pytest.raises(typer.Exit) as exited:
        payment_actions._print_not_ready_and_exit("pay_2", error, as_json=False)
    assert comparable_lines(capsys.readouterr().err) == quoted("payready: pay_2")
    assert f"The exit status is {exited.value.exit_code}." in TUTORIAL


def test_tutorial_quotes_payments_that_share_a_call() -> None:
    """Their list while they wait, and the facts about the second one."""
    waiting: dict[str, Any] = {"state": PaymentState.WAITING, "at": NOON, "amount": Decimal(300)}
    lines = [payment(f"pay_{number}", "acct_late01", **waiting) for number in (4, 3)]
    assert printed(render_payments.payment_table(lines, seconds(5.5))) == quoted("payment  verdict or reason")
    fields = {"reason": "insufficient_funds", "resolved_at": seconds(6), "refresh_id": "ref_1"}
    line = payment("pay_4", "acct_late01", PaymentState.FAILED, seconds(2.6), **fields, fee=fee("0.050000", 2))
    facts = quoted("needed 300.00 USD")
    history = timeline(line, "300.00", available="200.00", funds_held="300.00")
    assert printed_history(history, seconds(7))[-len(facts) :] == facts


def test_tutorial_quotes_fee_statement() -> None:
    """Five payments made four calls."""
    line = StatementLine(
        key="2026-11-22",
        price=DIME,
        currency="USD",
        calls=4,
        posted=4,
        pending=0,
        void=0,
        posted_amount=4 * DIME,
        pending_amount=Decimal(0),
    )
    totals = statement_report.totals_by_currency([line], {"USD": Savings(shared=1, by_sharing=DIME)})
    november = parse_period("2026-11")
    assert november is not None
    head = statement_report.head_lines(november, {"TEST": 4}, is_over=False)
    table = statement_tables.limited_statement_table([line], totals, head)
    assert printed(table) == quoted("Calls of 2026-11")


@pytest.mark.parametrize(
    "name", ["README.md", "docs/tutorial.md", "Makefile", "CONTRIBUTING.md", "cli/main.py", "cli/stack_commands.py"]
)
def test_number_of_demo_jobs_is_stated_correctly(name: str) -> None:
    """Each page has the number of jobs, and of scenarios by the accounts' names."""
    scenarios = {job.account_id.rstrip("0123456789") for job in DEMO_JOBS}
    assert re.search(rf"\b{len(DEMO_JOBS)} jobs (in|over) {len(scenarios)} ", (ROOT / name).read_text())
