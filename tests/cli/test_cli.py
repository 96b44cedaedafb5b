"""The command line: what it says, and the exit status it ends with."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cli import render
from cli.main import app
from config.settings import settings
from tests.cli.conftest import Books
from worker.rules.pricing import Price

Run = Callable[..., Any]


@pytest.fixture
def run(history: Books, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command on a ledger with a history; there is no broker."""
    monkeypatch.setenv("PAYREADY_DATABASE_URL", history.url)
    monkeypatch.setenv("PAYREADY_REDIS_URL", "redis://127.0.0.1:1/0")
    for module in ("main", "command_line"):
        monkeypatch.setattr(f"cli.{module}.settings", settings.__wrapped__)
    monkeypatch.setattr("cli.fee_commands.utc_now", lambda: datetime(2026, 12, 3, tzinfo=UTC))
    return lambda *words: CliRunner().invoke(app, list(words))


def test_show_tells_what_happened_in_the_order_in_which_it_did(run: Run) -> None:
    """With the funds_calculation of the verdict, the share of the fee, and who was not told yet."""
    said = run("payment", "show", "pay_3").output
    steps = ["failed: insufficient_funds", "job taken in", "call_ref_a_0", "fee posted", "bal_a", "failed  "]
    assert [said.index(step) for step in steps] == sorted(said.index(step) for step in steps)
    assert "25.00 USD needed; 10.00 there = 60.00 available - 50.00 released on it since (2)" in said
    assert "fee: 0.066666 USD, pending: a share of 0.20, between 3 payments" in said
    assert "not told yet: task-pay_3" in said
    said = run("payment", "show", "pay_reused").output
    assert "fee: none, an earlier call's balance served, which saved 0.10 USD" in said


def test_every_report_is_there_as_json(run: Run) -> None:
    """Money as strings, times in UTC."""
    shown = json.loads(run("payment", "show", "pay_1", "--json").output)
    assert shown["payment"]["fee"]["amount"] == "0.066667"
    assert shown["payment"]["requested_at"] == "2026-11-22T12:00:01Z"
    listed = json.loads(run("payment", "list", "--state", "waiting", "--json").output)
    assert [line["payment_id"] for line in listed] == ["pay_waits"]
    stated = json.loads(run("fees", "statement", "--month", "2026-11", "--json").output)
    saved = {"shared": 2, "by_sharing": "0.400000", "reused": 1, "by_reuse": "0.100000"}
    counts = {"calls": 4, "posted": 2, "pending": 1, "void": 1}
    sums = {"posted_amount": "0.200000", "pending_amount": "0.100000"}
    assert stated["totals"] == {"USD": {**counts, **sums, "saved": saved}}
    (line,) = stated["lines"]
    assert line == {"key": "2026-11-22", "price": "0.100000", "currency": "USD", **counts, **sums, "saved": None}


def test_every_command_has_its_answer_as_json() -> None:
    """Whoever writes a program need not read what is written for people."""

    def commands(group: Any, words: str = "payready") -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            yield from (
                commands(command, f"{words} {name}") if hasattr(command, "commands") else [(f"{words} {name}", command)]
            )

    found = dict(commands(typer.main.get_command(app)))
    assert len(found) > 15
    assert [
        name for name, command in found.items() if "--json" not in {o for p in command.params for o in p.opts}
    ] == []


def test_tables_name_what_they_list(run: Run) -> None:
    """For people."""
    said = run("payment", "list").output
    assert all(word in said for word in ("pay_waits", "insufficient_funds", "0.066667 pending", "reused"))
    stated = run("fees", "statement", "--month", "2026-11").output
    assert "4 calls; 0.20 USD due, 0.10 USD may be" in stated
    assert "saved: 0.40 USD by sharing (2 payments), 0.10 USD by reuse (1 payments)" in stated
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


@pytest.mark.parametrize("by", ["account", "day", "payment"])
def test_a_statement_says_the_same_in_every_form(run: Run, by: str) -> None:
    """The table, the JSON and the CSV have the same lines."""
    words = ["fees", "statement", "--month", "2026-11", "--by", by]
    told = json.loads(run(*words, "--json").output)["lines"]
    sheet = list(csv.DictReader(io.StringIO(run(*words, "--csv").output)))
    name = "payment_id" if by == "payment" else "key"
    assert [row[name] for row in sheet] == [line[name] or "" for line in told]
    amount = "fee" if by == "payment" else "posted_amount"
    assert [row[amount] for row in sheet] == [line[amount] for line in told]
    table = run(*words).output
    assert all((line[name] or "(no payment)") in table for line in told)
    assert run(*words, "--json", "--csv").exit_code == 2


COUNTED = "currency,calls,posted,pending,void,posted_amount,pending_amount"
HEADS = {
    None: f"key,price,{COUNTED}",
    "account": f"key,{COUNTED},shared,by_sharing,reused,by_reuse",
    "day": f"key,{COUNTED},shared,by_sharing,reused,by_reuse",
    "payment": "payment_id,account_id,refresh_id,shared_by,fee,currency,state,saved",
}


@pytest.mark.parametrize("by", HEADS)
def test_a_csv_has_its_columns_whether_there_is_a_line_or_none(run: Run, by: str | None) -> None:
    """Whoever reads a month without calls finds the columns all the same."""
    words = ["fees", "statement", "--csv", *(["--by", by] if by else [])]
    empty = run(*words, "--month", "2026-10").output
    full = run(*words, "--month", "2026-11").output
    assert empty == HEADS[by] + "\n"
    assert full.splitlines()[0] == HEADS[by]
    assert {line.count(",") for line in full.splitlines()} == {HEADS[by].count(",")}
    if by == "account":
        assert full.splitlines()[1] == "acct_a,USD,2,1,1,0,0.100000,0.100000,2,0.400000,1,0.100000"


INVOICE = """Acct,When,Fee,No
acct_a,2026-11-22T12:00:04Z,0.10,1
acct_a,2026-11-22T12:00:05Z,0.12,2
acct_x,2026-11-22T12:00:05Z,0.10,3
"""
WHOLE = INVOICE + "acct_c,2026-11-22T12:00:14Z,0.10,4\n"
MAPPED = ["--account-column", "Acct", "--date-column", "When", "--amount-column", "Fee", "--number-column", "No"]


def reconcile(run: Run, folder: Path, *words: str, text: str = INVOICE, month: str = "2026-11") -> Any:
    """Lay this file beside the ledger."""
    (folder / "invoice.csv").write_text(text)
    return run("fees", "reconcile", str(folder / "invoice.csv"), "--month", month, *MAPPED, *words)


def test_an_invoice_shows_what_agrees_and_what_does_not(run: Run, tmp_path: Path) -> None:
    """Columns are mapped by options; nothing is changed."""
    told = json.loads(reconcile(run, tmp_path, "--json").output)
    assert (told["matched"], told["settled"]) == (2, None)
    assert [(m["line"]["number"], m["call"]["price"]) for m in told["price_differences"]] == [("2", "0.100000")]
    assert [line["account_id"] for line in told["unmatched_lines"]] == ["acct_x"]
    assert [(call["account_id"], call["state"]) for call in told["unmatched_calls"]] == [("acct_c", "posted")]
    assert (len(told["to_post"]), told["to_void"]) == (1, [])
    said = reconcile(run, tmp_path).output
    assert "2 charges belong to calls of ours: 0.22 by them, 0.20 by us" in said
    assert "1 of them at another price than ours" in said
    assert "1 charges are for no call of ours" in said
    assert "1 calls of ours are not charged" in said
    assert "1 pending calls are charged, 0 are not: --apply posts and voids them" in said
    assert len(json.loads(run("fees", "questions", "--json").output)) == 1


def test_an_invoice_settles_what_is_pending_once(run: Run, history: Books, tmp_path: Path) -> None:
    """What it lists is posted with its line as evidence, what it does not list is void; again, nothing changes."""
    history.call("ref_d", "acct_d", None, datetime(2026, 11, 23, tzinfo=UTC))
    assert "1 pending calls posted, 1 void" in reconcile(run, tmp_path, "--apply", text=WHOLE).output
    entries = history.entries()
    assert "0 pending calls posted, 0 void" in reconcile(run, tmp_path, "--apply", text=WHOLE).output
    assert history.entries() == entries
    posted, void = (evidence for _, _, evidence in entries[-2:])
    assert (posted["line"], posted["number"], posted["amount"], posted["period"]) == (3, "2", "0.12", "2026-11")
    assert (void["line"], void["name"]) == (None, "invoice.csv")
    assert posted["digest"] == void["digest"]
    assert json.loads(run("fees", "questions", "--json").output) == []
    assert "0.30 USD due" in run("fees", "statement", "--month", "2026-11").output


WRONG = [
    (INVOICE.replace("0.12", "free"), "2026-11", "line 3: Fee must be an amount"),
    (INVOICE.replace("Fee", "Sum"), "2026-11", "no column 'Fee'"),
    (INVOICE, "2026-10", "line 2: 2026-11-22 is not in 2026-10"),
    (INVOICE.replace("acct_a", "acct_y"), "2026-11", "none of the 3 lines matches a call of the ledger"),
    (INVOICE.replace("2026-11-22", "2026-12-02"), "2026-12", "2026-12 is not over"),
    (INVOICE.splitlines()[0], "2026-11", "no lines after its header"),
    (INVOICE, "2026-11", "1 accepted calls are missing from the invoice"),
]


def test_a_wrong_file_is_refused_whole(run: Run, history: Books, tmp_path: Path) -> None:
    """With the line and the reason; nothing of it is applied."""
    before = history.entries()
    for text, month, said in WRONG:
        result = reconcile(run, tmp_path, "--apply", text=text, month=month)
        assert (result.exit_code, type(result.exception)) == (1, SystemExit)
        assert said in result.stderr
    assert history.entries() == before


def test_an_invoice_is_for_the_calls_in_its_currency(run: Run, history: Books, tmp_path: Path) -> None:
    """It compares, posts and voids no others; a line that is in another one is refused."""
    euro = Price(per_call=Decimal("0.10"), currency="EUR", price_list="2026-11-22")
    history.call("ref_a", "acct_a", None, datetime(2026, 11, 22, 12, 0, 5, tzinfo=UTC), euro)
    history.call("ref_more", "acct_e", None, datetime(2026, 11, 23, tzinfo=UTC), euro)
    assert "1 pending calls posted, 0 void" in reconcile(run, tmp_path, "--apply", text=WHOLE).output
    text = "Acct,When,Fee,No,Cur\nacct_a,2026-11-22,0.10,1,EUR\n"
    said = reconcile(run, tmp_path, "--currency-column", "Cur", text=text).stderr
    assert "line 2: Cur is 'EUR', but the calls are in USD" in said
    told = reconcile(run, tmp_path, "--currency-column", "Cur", "--currency", "EUR", "--apply", "--json", text=text)
    assert json.loads(told.output)["settled"] == {"posted": 1, "void": 1}
    assert [(call, state) for call, state, _ in history.entries()[-2:]] == [
        ("call_ref_a_2", "posted"),
        ("call_ref_more_0", "void"),
    ]
    assert reconcile(run, tmp_path, "--currency", "euro").exit_code == 2


def test_a_file_that_its_sum_proves_whole_is_believed(run: Run, history: Books, tmp_path: Path) -> None:
    """Though an accepted call is missing in it; a file that does not come to the sum is refused."""
    before = history.entries()
    result = reconcile(run, tmp_path, "--apply", "--total", "0.42")
    assert (result.exit_code, history.entries()) == (1, before)
    assert "the 3 lines add up to 0.32, but --total is 0.42" in result.stderr
    assert "1 pending calls posted, 0 void" in reconcile(run, tmp_path, "--apply", "--total", "0.32").output
    assert reconcile(run, tmp_path, "--total", "0,32").exit_code == 2


def test_the_turn_of_the_month_is_closed_by_the_second_of_two_invoices(
    run: Run, history: Books, tmp_path: Path
) -> None:
    """What neither has is void; what the first one charges is not charged by the second one's line too."""
    turn = datetime(2026, 11, 1, tzinfo=UTC)
    history.call("ref_charged", "acct_m", None, turn - timedelta(seconds=20))
    history.call("ref_free", "acct_f", None, turn - timedelta(seconds=10))
    charge = "acct_m,2026-11-01T00:00:01Z,0.10,9\n"
    october = reconcile(run, tmp_path, "--apply", "--json", text="Acct,When,Fee,No\n" + charge, month="2026-10")
    told = json.loads(october.output)
    assert (told["settled"], told["deferred_calls"]) == ({"posted": 1, "void": 0}, ["call_ref_free_0"])
    november = json.loads(reconcile(run, tmp_path, "--apply", "--json", text=WHOLE + charge).output)
    assert (november["settled"], november["to_void"]) == ({"posted": 1, "void": 1}, ["call_ref_free_0"])
    assert [one["account_id"] for one in november["unmatched_lines"]] == ["acct_m", "acct_x"]


def test_a_file_that_is_not_utf_8_is_refused_with_its_line(run: Run, tmp_path: Path) -> None:
    """An invoice that was saved as something else."""
    (tmp_path / "invoice.csv").write_bytes(INVOICE.encode().replace(b"acct_x", b"acct_\xe9"))
    result = run("fees", "reconcile", str(tmp_path / "invoice.csv"), "--month", "2026-11", *MAPPED)
    assert "line 4: not UTF-8" in result.stderr


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
    assert render.money_text(Decimal(value)) == text


def test_json_refuses_what_it_does_not_know() -> None:
    """Rather than writing something that looks like data."""
    unknown: Any = object()
    with pytest.raises(TypeError):
        render.as_json(unknown)
