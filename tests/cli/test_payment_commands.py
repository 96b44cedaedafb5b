"""`payready payment list`, `show` and `watch`, and what is common to all commands: `-h`, the version, few imports."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from cli import lazy_commands, render_payments
from cli.dead_letter_commands import DeadLetterCommands
from cli.fee_commands import FeeCommands
from cli.main import PaymentCommands, RootCommands, app
from cli.quarantine_commands import QuarantineCommands
from config.settings import settings
from config.version import payready_version
from demo.processes import ROOT
from tests.cli.conftest import NOON, LedgerBuilder
from worker.ledger import payment_search
from worker.ledger.engine import read_snapshot
from worker.ledger.payment_search import PaymentFilter
from worker.rules.states import PaymentState

Run = Callable[..., Any]


@pytest.fixture
def run(history: LedgerBuilder, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command on a ledger with a history."""
    monkeypatch.setenv("PAYREADY_DATABASE_URL", history.url)
    for module in ("payment_reports", "command_line"):
        monkeypatch.setattr(f"cli.{module}.settings", settings.__wrapped__)
    return lambda *arguments: CliRunner().invoke(app, ["payment", *arguments])


def listed(run: Run, *arguments: str) -> list[str]:
    result = run("list", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return [line["payment_id"] for line in json.loads(result.stdout)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--account", "acct_b"], ["pay_refused"]),
        (["--reason", "insufficient_funds"], ["pay_3"]),
        (["--state", "failed"], ["pay_refused", "pay_3"]),
        (["--task", "task-pay_2"], ["pay_2"]),
        (["--amount", "25"], ["pay_3", "pay_2", "pay_1"]),
        (["--metadata", "order=3"], ["pay_3"]),
        (["--metadata", "order=3", "--state", "released"], []),
        (["--since", "2026-11-22T12:00:02", "--until", "2026-11-22T13:00:03+01:00"], ["pay_2"]),
        (["--until", "2026-11-22"], []),
        (["--delivery", "undelivered"], ["pay_3"]),
        (["--delivery", "undeliverable"], []),
        (
            ["--resolved-since", "2026-11-22", "--resolved-until", "2026-11-23", "--reason", "insufficient_funds"],
            ["pay_3"],
        ),
        (["--resolved-since", "2026-11-23"], []),
        (["--limit", "2", "--account", "acct_a", "--after", "2026-11-22T12:00:03Z/pay_3"], ["pay_2", "pay_1"]),
    ],
    ids=str,
)
def test_payments_are_listed_by_their_conditions(run: Run, arguments: list[str], expected: list[str]) -> None:
    assert listed(run, *arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--since", "yesterday"], "must be a day or a time"),
        (["--since", "0001-01-01T00:00:00+23:00"], "must be a day or a time"),
        (["--amount", "1e5"], "must be a decimal"),
        (["--amount", "."], "must be a decimal"),
        (["--metadata", "order"], "must be KEY=VALUE"),
        (["--after", "pay_1"], "must be the key that the page before"),
        (["--reason", "bad"], "insufficient_funds"),
    ],
    ids=str,
)
def test_wrong_condition_is_wrong_usage(run: Run, arguments: list[str], message: str) -> None:
    result = run("list", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_full_page_prints_the_key_of_the_next_one(run: Run) -> None:
    """To standard error, so that a program reads only payments."""
    pages, arguments = [], ["--limit", "4"]
    while True:
        result = run("list", "--json", *arguments)
        pages.append([line["payment_id"] for line in json.loads(result.stdout)])
        if not result.stderr:
            break
        said, key = result.stderr.strip().rsplit(" ", 1)
        assert said == "more payments follow; continue with --after"
        arguments = ["--limit", "4", "--after", key]
    assert [len(page) for page in pages] == [4, 2]
    assert len({payment_id for page in pages for payment_id in page}) == 6


def test_bounded_search_prints_how_far_it_has_come(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payment_search, "MAX_EXAMINED", 3)
    result = run("list", "--metadata", "order=none")
    assert result.stdout == "no payments\n"
    assert result.stderr.startswith("searched back to 2026-11-22 12:00:")
    assert "; continue with --after 2026-11-22T12:00:" in result.stderr


@pytest.mark.parametrize("width", [80, 120, 240])
def test_payment_is_one_line(history: LedgerBuilder, width: int) -> None:
    """Also with ids as long as payready makes them. What does not fit is named."""
    payment_id = "pay_" + 32 * "f"
    history.payment(payment_id, "acct_" + 24 * "A", NOON + timedelta(hours=1), amount="12345.00")
    history.resolve(payment_id, PaymentState.FAILED, NOON + timedelta(hours=2), reason="provider_unavailable")
    with read_snapshot(history.engine) as tx:
        lines = payment_search.search_payments(tx, PaymentFilter()).payments
    file = StringIO()
    Console(file=file, width=width).print(render_payments.payment_table(lines, NOON), highlight=False)
    head, first, *rest = file.getvalue().splitlines()
    assert {len(line) > width for line in (head, first, *rest)} == {False}
    assert first.split()[:4] == [payment_id, "provider_unavailable", "12345.00", "USD"]
    hidden = [line for line in rest if line.startswith("not shown: ")]
    assert len(rest) - len(hidden) == len(lines) - 1
    assert bool(hidden) == (width < 240)
    assert ("requested" in head) == (width >= 120)


def test_payment_show_prints_explanation_metadata_and_callbacks(run: Run) -> None:
    output = run("show", "pay_3").output
    assert "the payer must act: add funds to the account, or pay in another way." in output
    assert "metadata order: 3" in output
    shown = json.loads(run("show", "pay_3", "--json").output)
    assert shown["explanation"]["must_act"] == "payer"
    assert shown["explanation"]["sentence"] in output
    assert shown["explanation"]["next_step"] in output
    assert shown["job"]["metadata"] == {"order": 3}


def test_watch_prints_each_change_until_the_payment_is_resolved(
    run: Run, history: LedgerBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit status is that of a failed payment."""
    waits: list[float] = []

    def resolve_at_third_wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            at = NOON + timedelta(seconds=20)
            history.resolve("pay_waits", PaymentState.FAILED, at, reason="cancelled")

    monkeypatch.setattr("cli.payment_reports.time.sleep", resolve_at_third_wait)
    result = run("watch", "pay_waits", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["state"], line["reason"]) for line in lines] == [("waiting", None), ("failed", "cancelled")]
    assert lines[1]["sentence"].endswith("cancelled: the detail; no action is needed.")
    assert (result.exit_code, waits) == (3, [0.5, 0.5, 0.5])
    assert run("watch", "pay_1").exit_code == 0
    assert "no payment pay_unknown in the ledger" in run("watch", "pay_unknown").stderr


# --- every command ----------------------------------------------------------------------------------------------------


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in group.commands.items():
        yield from commands(command, (*path, name)) if hasattr(command, "commands") else [(*path, name)]


def all_commands() -> list[tuple[str, ...]]:
    root: Any = typer.main.get_command(app)
    root.load_all()
    return list(commands(root))


@pytest.mark.parametrize("path", all_commands(), ids=" ".join)
def test_short_option_prints_help(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "-h"])
    assert (result.exit_code, "Usage: " in result.output) == (0, True)


def test_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"payready {payready_version()}\n"


@pytest.mark.parametrize("group", [RootCommands, PaymentCommands, FeeCommands, DeadLetterCommands, QuarantineCommands])
def test_summary_in_help_is_the_first_sentence_of_the_command(group: type[lazy_commands.LazyGroup]) -> None:
    for name, lazy in group.table.items():
        command = lazy_commands._imported(name, lazy)
        assert " ".join(command.help.partition("\n\n")[0].split()) == lazy.summary or command.help.startswith(
            lazy.summary
        )


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        ("--version", {"pydantic", "sqlalchemy", "psycopg", "celery", "redis", "httpx", "rich"}),
        ("-h", {"pydantic", "sqlalchemy", "psycopg", "celery", "redis", "httpx"}),
        ("payment -h", {"sqlalchemy", "psycopg", "celery", "redis", "httpx"}),
        ("fees -h", {"sqlalchemy", "psycopg", "celery", "redis", "httpx"}),
        *(
            (f"{command} -h", {"celery", "kombu", "redis", "httpx", "opentelemetry", "starlette", "structlog"})
            for command in ("payment list", "fees statement", "fees pending", "dead-letters list", "quarantine list")
        ),
    ],
)
def test_command_imports_only_what_it_needs(arguments: str, forbidden: set[str]) -> None:
    """Imports are most of the time that a command takes."""
    command = [sys.executable, "-X", "importtime", "-m", "cli.main", *arguments.split()]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in completed.stderr.splitlines()}
    assert imported & {"typer"}
    assert imported & forbidden == set()


def test_redeliver_since_asks_first_and_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.command_runtime.settings", settings.__wrapped__)
    since = ["redeliver", "--since", "2026-11-22T12:00:08", "--until", "2026-11-22T13:00:00"]
    assert run(*since).exit_code == 1
    result = run(*since, "--yes")
    assert result.stdout == "redelivery scheduled for 2 payments, 2 tasks\n"
    assert "redelivery scheduled up to 2026-11-22T12:00:12+00:00" in result.stderr
    assert json.loads(run(*since, "--yes", "--json").stdout) == {"payments": 2, "tasks": 2}


@pytest.mark.parametrize("arguments", [[], ["pay_1", "--since", "2026-11-22"], ["pay_1", "--until", "2026-11-22"]])
def test_redeliver_needs_a_payment_or_a_period(run: Run, arguments: list[str]) -> None:
    result = run("redeliver", *arguments)
    assert result.exit_code == 2
    assert "give the id of a payment, or --since TIME" in " ".join(result.stderr.replace("│", " ").split())
