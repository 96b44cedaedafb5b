"""`balances.refresh`: the one paid call."""

from tasks.app import app
from tasks.delivery import carry_out
from worker import flow
from worker.runtime import runtime


@app.task(name="balances.refresh")
def refresh(account_id: str, refresh_id: str) -> None:
    """Make the refresh's call, unless it was made, or is not needed any more."""
    carry_out(flow.call(runtime(), account_id, refresh_id))
