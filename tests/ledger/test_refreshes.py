"""Refreshes: a write that lost against another transaction changes nothing, and its caller can find out."""

from dataclasses import replace
from datetime import timedelta

from tests.support.in_process import START
from worker.ledger import refreshes
from worker.ledger.engine import Engine, transaction
from worker.ledger.refreshes import RefreshRecord
from worker.rules.states import RefreshEvent, RefreshState


def calling(number: int) -> RefreshRecord:
    """Return a refresh whose call was claimed at `START`."""
    return RefreshRecord(
        refresh_id=f"ref_{number}",
        account_id=f"acct_{number}",
        state=RefreshState.CALLING,
        call_count=1,
        called_at=START,
        claimed_at=START,
        due_at=START,
    )


def test_transitions_return_only_refreshes_that_are_unchanged_and_allow_the_event(engine: Engine) -> None:
    stored = [calling(number) for number in range(3)]
    reclaimed = replace(stored[1], claimed_at=START - timedelta(seconds=1))
    answered = replace(stored[2], state=RefreshState.ANSWERED)
    with transaction(engine) as tx:
        refreshes.insert_refreshes(tx, stored)
        transitions = [(read, START) for read in (stored[0], reclaimed, answered)]
        accepted = refreshes.transition_all_and_clear_errors(tx, RefreshEvent.ACCEPT, transitions).result()
        states = {number: record.state for number in range(3) if (record := refreshes.find(tx, f"ref_{number}"))}
    assert accepted == {"ref_0"}
    assert states == {0: RefreshState.ACCEPTED, 1: RefreshState.CALLING, 2: RefreshState.CALLING}
