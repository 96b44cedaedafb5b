"""What the provider reports about connections of accounts: a connection is lost, or an account has moved."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, kw_only=True)
class ConnectionLost:
    """A connection or a profile that can deliver no balance any more."""

    detail: str
    """Text for the payments service. It becomes the detail of each failed payment."""
    at: datetime
    """Payments that were requested later are not affected: their service may have known, or the user reconnected."""
    connection_id: str | None = None
    profile_id: str | None = None
    """Set if the whole profile is lost, else `connection_id` is set."""


@dataclass(frozen=True, kw_only=True)
class AccountMoved:
    """An account that has moved to another connection."""

    account_id: str
    connection_id: str
    at: datetime
    """A payment that knows of a later move ignores this one."""


ConnectionUpdate = ConnectionLost | AccountMoved
