"""Values from outside in the output: a terminal obeys none, and none forges a line."""

from dataclasses import replace
from datetime import timedelta
from io import StringIO

import pytest
import typer
from rich.console import Console, RenderableType

from cli import doctor_command, fee_tables, render_payments
from cli.command_line import echo_line, fail
from cli.doctor_results import error
from cli.render import new_table
from tests.cli.conftest import NOON, LedgerBuilder
from worker.ledger import payment_report
from worker.ledger.engine import read_snapshot
from worker.ledger.payment_situation import explain_payment

FORGED = "x\r\npay_2: released\x1b[2J\x07\x85\u2028[bold]"
ESCAPED = r"x\r\npay_2: released\x1b[2J\x07\x85\u2028[bold]"


def printed(renderable: RenderableType) -> str:
    console = Console(file=StringIO(), width=500)
    console.print(renderable, highlight=False)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_cell_and_title_of_a_table_are_literal() -> None:
    table = new_table("account", "reason", title=FORGED)
    table.add_row(FORGED, FORGED)
    title, _, row = (line.rstrip() for line in printed(table).splitlines())
    assert title == ESCAPED
    assert row.split("  ") == [ESCAPED, ESCAPED]
    assert printed(fee_tables.limited_pending_table([], FORGED)).startswith(ESCAPED)


def test_check_result_is_literal() -> None:
    """The name of a worker, for instance, is from outside."""
    lines = printed(doctor_command.check_result_text(error("celery", FORGED, FORGED))).splitlines()
    assert lines == [f"✗ celery: {ESCAPED}", f"    {ESCAPED}"]


@pytest.mark.parametrize("ledger", ["sqlite"], indirect=True)
def test_history_of_a_payment_is_literal(history: LedgerBuilder) -> None:
    with read_snapshot(history.engine) as tx:
        timeline = payment_report.payment_timeline(
            tx, "pay_refused", clock_skew=timedelta(0), default_hold_s=0, callback_queue="celery"
        )
    assert timeline is not None
    explained = explain_payment(timeline, NOON)
    line = replace(timeline.payment, reason=FORGED, account_id=FORGED)
    output = printed(render_payments.payment_timeline(replace(timeline, payment=line), explained, NOON))
    assert output.count(ESCAPED) >= 3, output
    assert output.replace("\n", "").isprintable()
    assert "\npay_2: released" not in output


def test_line_and_error_are_literal(capsys: pytest.CaptureFixture[str]) -> None:
    """The further lines of an error are indented."""
    echo_line(FORGED)
    with pytest.raises(typer.Exit):
        fail(FORGED)
    output = capsys.readouterr()
    assert output.out == ESCAPED + "\n"
    assert output.err == "payready: " + ESCAPED.replace(r"\n", "\n    ") + "\n"
