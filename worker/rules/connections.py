"""The shapes on the wire: the job and the outcome of the payments service, and the events of the provider.

JSON Schema of the first two is published under `docs/contracts/`. No error text shows the input: it may be private.
"""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class ConnectionLost:
    """No balance will come for the accounts of a connection, or of a profile: what happened, and to which."""

    detail: str
    """What the payments service is told."""
    at: datetime
    """Payments that came later know of it, or of what came after it."""
    connection_id: str | None = None
    profile_id: str | None = None


@dataclass(frozen=True)
class AccountMoved:
    """An account moved to a connection."""

    account_id: str
    connection_id: str
    at: datetime
    """Where it is said to have moved before that is no news any more."""


ConnectionUpdate = ConnectionLost | AccountMoved
"""What became of a connection, a profile or an account, as of a time."""
