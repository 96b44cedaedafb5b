"""The story of a payment, from top to bottom.

    initiate   a job comes in: write it down, find or begin the refresh that will serve it     `intake`
    claim      account for a paid call before it is made; `make` it; `book` how it ended       `calls`
    receive    balances come in: keep them, and settle who waits for them                      `settling`
    apply      the same for a balance that was kept before
    look       time passes: fail what is past its deadline, see to what was lost on the way    `upkeep`
    cancel     the payments service changes its mind

Nothing here enqueues or delivers: each step returns what is to be done `Next`, and can be repeated at any time.
Who wins between a balance and a deadline is decided in SQL, by whoever holds the waiting row first. Steps take what is
at hand together, in one transaction; who has to be waited for is left to come alone.
"""

from worker.flow.calls import PATIENCE, Claim, End, book, call, claim, make, unmade
from worker.flow.intake import Announce, Entrance, Request, initiate, initiate_many
from worker.flow.settling import apply, read, readmit, receive, trim_quarantine
from worker.flow.steps import BATCH, RETRY, Next
from worker.flow.upkeep import cancel, delivered, look, overdue, replay, revoke, sweep, undelivered

__all__ = [
    "BATCH",
    "PATIENCE",
    "RETRY",
    "Announce",
    "Claim",
    "End",
    "Entrance",
    "Next",
    "Request",
    "apply",
    "book",
    "call",
    "cancel",
    "claim",
    "delivered",
    "initiate",
    "initiate_many",
    "look",
    "make",
    "overdue",
    "read",
    "readmit",
    "receive",
    "replay",
    "revoke",
    "sweep",
    "trim_quarantine",
    "undelivered",
    "unmade",
]
