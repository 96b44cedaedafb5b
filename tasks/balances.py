"""`balances.refresh`: the one paid call; `balances.read`: the free look, when a webhook may be lost."""

from tasks.app import app
from tasks.delivery import carry_out
from worker import flow
from worker.runtime import runtime


@app.task(name="balances.refresh", Strategy="tasks.batches:calls")
def refresh(account_id: str, refresh_id: str, in_turn: bool = False) -> None:  # noqa: FBT001, FBT002 - as it is sent
    """Make the refresh's call, unless it was made, or is not needed any more."""
    carry_out(flow.call(runtime(), account_id, refresh_id, in_turn=in_turn))


@app.task(name="balances.read")
def read(account_id: str, profile_id: str) -> None:
    """Read the account's balance, before payments that wait for it expire."""
    carry_out(flow.read(runtime(), account_id, profile_id))
