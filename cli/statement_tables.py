"""The fee statement as tables for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from rich.console import Group, RenderableType
from rich.text import Text

from cli.render import MAX_ROWS, literal_text, new_table, omitted_rows_remark, styled_state
from worker.ledger.fee_statement import StatementLine
from worker.ledger.payment_shares import PaymentShare
from worker.reports.statement_report import StatementTotal, comparison_rows, total_lines
from worker.rules.decimals import amount_text
from worker.rules.statement_period import StatementPeriod

COUNT_AND_AMOUNT_COLUMNS = ("calls", "posted", "pending", "void", "posted amount", "pending amount")


def limited_statement_table(
    lines: Sequence[StatementLine], sums: Mapping[str, StatementTotal], head: Sequence[str], by: str = "price"
) -> RenderableType:
    """Return a statement as a table with one row for each line, and the totals below."""
    if not lines:
        return Group(*_head_texts(head), Text("no calls"))
    key_columns = ("price list", "price") if by == "price" else (by,)
    saved_column = () if by == "price" else ("saved",)
    table = new_table(
        *key_columns,
        *COUNT_AND_AMOUNT_COLUMNS,
        "currency",
        *saved_column,
        right=["price", *COUNT_AND_AMOUNT_COLUMNS, "saved"],
    )
    for line in lines[:MAX_ROWS]:
        key = (line.key,) if line.price is None else (line.key, amount_text(line.price, line.currency))
        counts = (str(count) for count in (line.calls, line.posted, line.pending, line.void))
        amounts = (amount_text(amount, line.currency) for amount in (line.posted_amount, line.pending_amount))
        saved = () if line.saved is None else (amount_text(line.saved.total, line.currency),)
        table.add_row(*key, *counts, *amounts, line.currency, *saved)
    texts = (literal_text(text) for text in total_lines(sums))
    return Group(*_head_texts(head), table, *omitted_rows_remark(len(lines)), *texts)


def _head_texts(head: Sequence[str]) -> list[Text]:
    return [literal_text(line, "" if number else "bold") for number, line in enumerate(head)]


def comparison_table(
    now: Mapping[str, StatementTotal], before: Mapping[str, StatementTotal], period: StatementPeriod
) -> RenderableType:
    """Return the totals of a period beside those of the period before it, in each currency."""
    names = (period.previous.name, period.name)
    table = new_table("", *names, "change", "", "currency", right=[*names, "change", ""])
    for row in comparison_rows(now, before):
        table.add_row(*row)
    return Group(Text(), literal_text(f"Compared with {period.previous.name}", "bold"), table)


def limited_share_table(shares: Iterable[PaymentShare], head: Sequence[str]) -> RenderableType:
    """Return the fee share of each payment as a table."""
    table = new_table(
        "payment", "account", "shared by", "fee", "currency", "state", "saved", right=["shared by", "fee", "saved"]
    )
    rows = iter(shares)
    for share in islice(rows, MAX_ROWS):
        table.add_row(
            share.payment_id or "(no payment)",
            share.account_id,
            str(share.shared_by or ""),
            amount_text(share.fee, share.currency),
            share.currency,
            styled_state(share.state),
            amount_text(share.saved, share.currency) if share.saved else "",
        )
    return Group(*_head_texts(head), table, *omitted_rows_remark(MAX_ROWS + sum(1 for _ in rows)))
