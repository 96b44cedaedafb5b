"""Refresh calls, each made of its pending fee entry and its final one.

`CALLS` and its columns are the base of the reports on payments and of the reconciliation with an invoice.
"""

from sqlalchemy import func

from worker.ledger.tables import FEE_ENTRY, state_in
from worker.rules.pricing import EntryState

PENDING_ENTRY, FINAL_ENTRY = FEE_ENTRY.alias("pending_entry"), FEE_ENTRY.alias("final_entry")
CALL_STATE = func.coalesce(FINAL_ENTRY.c.state, EntryState.PENDING.value).label("state")
CALLS = PENDING_ENTRY.outerjoin(
    FINAL_ENTRY,
    (FINAL_ENTRY.c.call_id == PENDING_ENTRY.c.call_id) & ~state_in(FINAL_ENTRY.c.state, {EntryState.PENDING}),
)
"""One row per call, together with `IS_PENDING_ENTRY`: its pending entry, and its final entry or nulls."""
IS_PENDING_ENTRY = state_in(PENDING_ENTRY.c.state, {EntryState.PENDING})
