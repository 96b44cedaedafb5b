"""The command line: what it says, and the exit status it ends with."""

import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from typer.testing import CliRunner

from config.settings import settings
from console import show
from console.cli import app
from tests.console.conftest import Books

Run = Callable[..., Any]


@pytest.fixture
def run(history: Books, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command on a ledger with a history; there is no broker."""
    monkeypatch.setenv("PAYREADY_DATABASE_URL", history.url)
    monkeypatch.setenv("PAYREADY_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setattr("console.cli.settings", settings.__wrapped__)
    return lambda *words: CliRunner().invoke(app, list(words))


def test_show_tells_what_happened_in_the_order_in_which_it_did(run: Run) -> None:
    """With the arithmetic of the verdict, the share of the fee, and who was not told yet."""
    said = run("payment", "show", "pay_3").output
    steps = ["failed: insufficient_funds", "job taken in", "call_ref_a_0", "fee posted", "bal_a", "failed  "]
    assert [said.index(step) for step in steps] == sorted(said.index(step) for step in steps)
    assert "25.00 USD needed; 10.00 there = 60.00 available - 50.00 released on it since (2)" in said
    assert "fee: 0.066666 USD, pending: a share of 0.20, between 3 payments" in said
    assert "not told yet: task-pay_3" in said


def test_every_report_is_there_as_json(run: Run) -> None:
    """Money as strings, times in UTC."""
    shown = json.loads(run("payment", "show", "pay_1", "--json").output)
    assert shown["payment"]["fee"]["amount"] == "0.066667"
    assert shown["payment"]["requested_at"] == "2026-11-22T12:00:01Z"
    listed = json.loads(run("payment", "list", "--state", "waiting", "--json").output)
    assert [line["payment_id"] for line in listed] == ["pay_waits"]
    stated = json.loads(run("fees", "statement", "--month", "2026-11", "--json").output)
    assert stated["totals"] == {"USD": {"calls": 4, "posted": "0.200000", "pending": "0.100000"}}
    assert [(line["state"], line["amount"]) for line in stated["lines"]] == [
        ("posted", "0.200000"),
        ("pending", "0.100000"),
        ("void", "0"),
    ]


def test_tables_name_what_they_list(run: Run) -> None:
    """For people."""
    said = run("payment", "list").output
    assert all(word in said for word in ("pay_waits", "insufficient_funds", "0.066667 pending", "reused"))
    assert "4 calls; 0.20 USD due, 0.10 USD may be" in run("fees", "statement", "--month", "2026-11").output
    assert "no calls" in run("fees", "statement", "--month", "2026-10").output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["payment", "show", "pay_nobody"], "the ledger has no payment pay_nobody"),
        (["payment", "cancel", "pay_1"], "the broker or the result backend is away"),
        (["payment", "enqueue", "acct_a", "--amount", "25.00"], "the broker or the result backend is away"),
        (["payment", "enqueue", "acct_a", "--amount", "-1"], "amount: Input should be greater than 0"),
        (["payment", "enqueue", "acct_a", "--timeout-s", "0"], "timeout_s: "),
    ],
)
def test_what_goes_wrong_is_said_in_a_sentence(run: Run, words: list[str], said: str) -> None:
    """With status 1, and without a traceback."""
    result = run(*words)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert result.stderr.startswith("payready: ")
    assert said in result.stderr


@pytest.mark.parametrize("month", ["2026-13", "2026-1", "26-11", "0000-01", "9999-12", "november"])
def test_a_month_that_is_none_is_refused(run: Run, month: str) -> None:
    """With the status for wrong usage."""
    assert run("fees", "statement", "--month", month).exit_code == 2


def test_a_misspelt_setting_and_a_ledger_that_is_not_there_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one knows what to change."""
    monkeypatch.setenv("PAYREADY_DATABASE_URL", "sqlite:////nowhere/at/all.db")
    assert "the ledger cannot be read: unable to open database file" in run("payment", "list").stderr
    monkeypatch.setenv("PAYREADY_DATABASE_URI", "x")
    assert "PAYREADY_DATABASE_URI is not a setting of payready" in run("payment", "list").stderr


@pytest.mark.parametrize(
    ("value", "text"), [("0.100000", "0.10"), ("0.033333", "0.033333"), ("25", "25.00"), ("500.0", "500.00")]
)
def test_money_has_two_places_or_as_many_as_it_needs(value: str, text: str) -> None:
    """Never an exponent, never a lost digit."""
    assert show.money(Decimal(value)) == text


def test_json_refuses_what_it_does_not_know() -> None:
    """Rather than writing something that looks like data."""
    unknown: Any = object()
    with pytest.raises(TypeError):
        show.as_json(unknown)
