"""The table of pending calls."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from cli.render import MAX_ROWS, literal_text, new_table, omitted_rows_remark
from worker.ledger.fee_calls import PendingCall
from worker.rules.decimals import amount_text
from worker.rules.times import utc_time_text


def limited_pending_table(calls: Sequence[PendingCall], title: str) -> RenderableType:
    """Return pending calls as a table."""
    if not calls:
        return Group(literal_text(title, "bold"), Text("none"))
    table = new_table("call", "account", "time", "price", "", "last error", title=title, right=["price"])
    for call in calls[:MAX_ROWS]:
        price = amount_text(call.price, call.currency)
        table.add_row(
            call.call_id, call.account_id, utc_time_text(call.called_at), price, call.currency, call.last_error or ""
        )
    return Group(table, *omitted_rows_remark(len(calls)))
