"""Sessions of the dashboard, and the counters that lock out guessing, in Redis.

The token of a session is known only to its browser: Redis has a digest. Losing the keys ends all sessions and lockouts.
"""

import hashlib
import json
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import cast

from redis import Redis

from worker.correlation.redis_client import LuaScript, epoch_us, from_epoch_us

IDLE_LIMIT = timedelta(minutes=30)
"""A session ends this long after its last request."""
AGE_LIMIT = timedelta(hours=8)
"""A session ends this long after the login."""
MAX_FAILURES_OF_NAME = 5
MAX_FAILURES_OF_ADDRESS = 20
"""Failed attempts within `LOCKOUT` after which further ones are refused."""
LOCKOUT = timedelta(minutes=15)
"""Time in which failed attempts are counted, and for which further ones are refused."""
TOKEN_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Session:
    """A session of a user."""

    user_name: str
    credential: str
    """Digest of what the user logged in with. A session whose user has another one has ended."""
    created_at: datetime


class DashboardSessions:
    """The sessions of all replicas. The operations raise `REDIS_UNAVAILABLE`."""

    def __init__(self, redis: Redis, *, key_prefix: str = "") -> None:
        self._redis, self._key_prefix = redis, key_prefix

    def create(self, *, user_name: str, credential: str, now: datetime) -> str:
        """Store a new session. Return its token, which is the only proof of it."""
        token = secrets.token_urlsafe(TOKEN_BYTES)
        value = json.dumps({"user_name": user_name, "credential": credential, "created_us": epoch_us(now)})
        self._redis.set(self._key(token), value, ex=IDLE_LIMIT)
        return token

    def find(self, token: str, now: datetime, *, extends: bool) -> Session | None:
        """Return the session of a token, unless it has ended. `extends`: the request counts as use of the session."""
        key = self._key(token)
        stored = cast(str | None, self._redis.getex(key, ex=IDLE_LIMIT) if extends else self._redis.get(key))
        if stored is None:
            return None
        fields = json.loads(stored)
        created_at = from_epoch_us(fields.pop("created_us"))
        if now - created_at >= AGE_LIMIT:
            self.delete(token)
            return None
        return Session(created_at=created_at, **fields)

    def delete(self, token: str) -> None:
        """End a session."""
        self._redis.delete(self._key(token))

    def ping(self) -> None:
        """Raise `REDIS_UNAVAILABLE` if Redis does not respond."""
        self._redis.ping()

    def _key(self, token: str) -> str:
        return f"{self._key_prefix}payready:dashboard:session:{hashlib.sha256(token.encode()).hexdigest()}"


class LoginAttempts:
    """Counters of failed attempts by name and by address. The operations raise `REDIS_UNAVAILABLE`.

    An attempt counts as failed until it succeeds, so that attempts at the same moment cannot pass together.
    """

    def __init__(self, redis: Redis, *, key_prefix: str = "") -> None:
        self._redis, self._key_prefix = redis, key_prefix
        self._count = LuaScript(redis, "count_attempt")
        self._uncount = LuaScript(redis, "uncount_attempt")

    def count(self, *, name: str, address: str) -> bool:
        """Count an attempt. Return False if it must be refused: the name or the address has too many failures.

        The names need not be those of users: an unknown name is locked out as a known one.
        """
        duration_s = int(LOCKOUT.total_seconds())
        # The address first: when it is locked out, its attempts cannot lock out names.
        if (
            self._count([self._key("address", address)], [MAX_FAILURES_OF_ADDRESS, duration_s])
            > MAX_FAILURES_OF_ADDRESS
        ):
            return False
        attempts = self._count([self._key("name", name)], [MAX_FAILURES_OF_NAME, duration_s])
        return bool(attempts <= MAX_FAILURES_OF_NAME)

    def succeed(self, *, name: str, address: str) -> None:
        """Take back an attempt that has succeeded, and the failures of its name. Those of the address stay."""
        self._redis.delete(self._key("name", name))
        self._uncount([self._key("address", address)], [])

    def _key(self, kind: str, text: str) -> str:
        return f"{self._key_prefix}payready:dashboard:attempts:{kind}:{hashlib.sha256(text.encode()).hexdigest()}"
