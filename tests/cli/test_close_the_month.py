"""The commands of docs/howto/close-the-month.md, run in their order on the sample invoices."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlmodel import SQLModel
from typer.testing import CliRunner

from cli.main import app
from config.settings import settings
from demo.processes import ROOT
from tests.cli.conftest import LedgerBuilder
from worker.ledger.engine import open_engine
from worker.rules.pricing import EntryState

PAGE = (ROOT / "docs" / "howto" / "close-the-month.md").read_text()
BLOCK = re.compile(r"```(console|text)\n(.*?)```", re.DOTALL)
CALLS = (
    ("acct_a", datetime(2026, 11, 3, 9, 15, tzinfo=UTC), EntryState.POSTED),
    ("acct_a", datetime(2026, 11, 12, 14, 30, tzinfo=UTC), None),
    ("acct_b", datetime(2026, 11, 12, 14, 31, tzinfo=UTC), EntryState.POSTED),
    ("acct_b", datetime(2026, 11, 20, 8, tzinfo=UTC), None),
    ("acct_c", datetime(2026, 11, 25, 17, 45, tzinfo=UTC), EntryState.POSTED),
)
"""The ledger that the page describes: time, account, and final state of five calls of 0.10 USD."""


@pytest.fixture
def sample_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LedgerBuilder]:
    url = f"sqlite:///{tmp_path}/ledger.db"
    engine = open_engine(url, connections=1, may_create_file=True)
    SQLModel.metadata.create_all(engine)
    ledger = LedgerBuilder(url, engine)
    for account, at, end in CALLS:
        ledger.call(account.replace("acct", "ref"), account, end, at)
    monkeypatch.setenv("PAYREADY_DATABASE_URL", url)
    for module in ("command_line", "reconcile_commands"):
        monkeypatch.setattr(f"cli.{module}.settings", settings.__wrapped__)
    for module in ("pending_calls_command", "reconcile_commands"):
        monkeypatch.setattr(f"cli.{module}.utc_now", lambda: datetime(2026, 12, 3, tzinfo=UTC))
    yield ledger
    engine.dispose()


def steps() -> list[tuple[list[str], list[str]]]:
    """Return each command on the samples or the pending calls, with the lines that the page quotes of its output."""
    found: list[tuple[list[str], list[str]]] = []
    for kind, text in BLOCK.findall(PAGE):
        if kind == "console":
            joined = text.replace("\\\n", " ")
            commands = [line.split() for line in joined.splitlines() if line.startswith("payready fees ")]
            is_run = [c for c in commands if "pending" in c or any("docs/samples/" in word for word in c)]
            found += [([word.strip("'\"") for word in re.findall(r'"[^"]*"|\S+', " ".join(c))][1:], []) for c in is_run]
        else:
            found[-1][1].extend(text.splitlines())
    return found


def test_page_quotes_its_commands_output(
    sample_ledger: LedgerBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last quoted line is the exit status. Only --apply changes the ledger."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    assert len(steps()) > 10
    for arguments, quoted in steps():
        before = sample_ledger.entries()
        result = CliRunner().invoke(app, arguments)
        output = [" ".join(line.split()) for line in (result.output + f"\nexit status {result.exit_code}").splitlines()]
        rest = iter(output)
        missing = [line for line in quoted if line != "..." and " ".join(line.split()) not in rest]
        assert not missing, (arguments, missing, "\n".join(output))
        assert (sample_ledger.entries() == before) or "--apply" in arguments
    final = [(call, state) for call, state, _ in sample_ledger.entries()[-2:]]
    assert final == [("call_ref_a_1", "posted"), ("call_ref_b_1", "void")]


def test_page_uses_every_sample() -> None:
    for file in (ROOT / "docs" / "samples").iterdir():
        assert f"docs/samples/{file.name}" in PAGE, file.name
