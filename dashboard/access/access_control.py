"""Access control of the dashboard: which user a request has, logins, and logouts."""

import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from functools import partial
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import HTTPConnection

from config.log_config import get_logger
from config.settings import Settings
from dashboard.access.password_hashes import verify_password
from dashboard.access.trusted_proxies import AmbiguousUser, TrustedProxies
from dashboard.access.users import User, UserDirectory
from worker.correlation.dashboard_logins import DashboardSessions, LoginAttempts, Session

log = get_logger(__name__)
T = TypeVar("T")
MAX_UNFINISHED_LOGINS = 8
"""Logins at a time. One is verified, which costs 0.1 s of a core, the others wait, and further ones are refused."""
REDIS_THREADS = 4
_TOKEN = re.compile("[A-Za-z0-9_-]{43}")
_PROXY_CREDENTIAL = "proxy"
"""Credential of a session whose user is named by the proxy in each request. No user of the settings has it."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The user of a request."""

    user: User
    csrf_token: str
    """Token of the forms of this session. Empty if the request has none, so that no form is accepted."""
    new_session: str | None = None
    """Token of a session that the response must give to the browser."""


class NotAdmitted(Exception):
    """The proxy names a user without access."""


class LoginFailure(Enum):
    """Why a login was refused. The texts say nothing about which names exist."""

    WRONG = "the name or the password is wrong"
    LOCKED_OUT = "too many failed attempts; try again in 15 minutes"
    BUSY = "too many logins at this moment; try again in a few seconds"


class AccessControl:
    """The users, sessions and failed logins of a dashboard. Operations on Redis raise `REDIS_UNAVAILABLE`."""

    def __init__(
        self, settings: Settings, sessions: DashboardSessions, attempts: LoginAttempts, clock: Callable[[], datetime]
    ) -> None:
        """Read the users.

        Raises:
            ConfigurationError: the users cannot be read, or none could log in.
        """
        self._sessions, self._attempts, self._clock = sessions, attempts, clock
        self._directory = UserDirectory(settings)
        self._proxies = TrustedProxies(settings)
        self.is_production = settings.env == "production"
        # Browsers accept a `__Host-` cookie only with Secure, from this host itself, and for all paths.
        self.cookie_name = "__Host-payready_session" if self.is_production else "payready_session"
        self._unfinished_logins = 0
        self._redis_threads, self._verifications = CapacityLimiter(REDIS_THREADS), CapacityLimiter(1)

    async def identify(self, connection: HTTPConnection, *, extends: bool) -> Identity | None:
        """Return the user of a request. `extends`: the request counts as use of the session, and may begin one.

        Raises:
            NotAdmitted: the proxy names a user without access, or several users.
        """
        return await self._in_thread(partial(self._identify, connection, extends=extends))

    async def still_admits(self, connection: HTTPConnection, user: User) -> bool:
        """Return whether the session of a request that began earlier still has this user, in the same role."""
        try:
            identity = await self.identify(connection, extends=False)
        except NotAdmitted:
            return False
        return identity is not None and identity.user == user

    async def log_in(self, connection: HTTPConnection, *, name: str, password: str) -> str | LoginFailure:
        """Check a password. Return the token of a new session, or why the login was refused.

        The time does not depend on whether the name exists.
        """
        address = self._proxies.client_network(connection)
        if self._unfinished_logins >= MAX_UNFINISHED_LOGINS:
            return self._refuse(LoginFailure.BUSY, address)
        self._unfinished_logins += 1
        try:
            return await self._log_in(connection, name=name, password=password, address=address)
        finally:
            self._unfinished_logins -= 1

    async def _log_in(
        self, connection: HTTPConnection, *, name: str, password: str, address: str
    ) -> str | LoginFailure:
        if not await self._in_thread(partial(self._attempts.count, name=name, address=address)):
            return self._refuse(LoginFailure.LOCKED_OUT, address)
        account = self._directory.account_of_password(name)
        password_hash = self._directory.hash_to_verify(name)
        is_right = password_hash is not None and await to_thread.run_sync(
            verify_password, password_hash, password, limiter=self._verifications
        )
        if account is None or not is_right:
            return self._refuse(LoginFailure.WRONG, address)
        await self._in_thread(partial(self._attempts.succeed, name=name, address=address))
        await self.end_session(connection)  # a token from before the login must not have the rights of the user
        log.info("dashboard.logged_in", user=name, address=address)
        create = partial(self._sessions.create, user_name=name, credential=account.credential, now=self._clock())
        return await self._in_thread(create)

    async def end_session(self, connection: HTTPConnection) -> None:
        """End the session of a request, if it has one."""
        token = self._token(connection)
        if token:
            await self._in_thread(partial(self._sessions.delete, token))

    def _identify(self, connection: HTTPConnection, *, extends: bool) -> Identity | None:
        token, now = self._token(connection), self._clock()
        session = self._sessions.find(token, now, extends=extends) if token else None
        try:
            name = self._proxies.user_name(connection)
        except AmbiguousUser:
            raise NotAdmitted from None
        if name is not None:
            return self._identity_of_proxy(name, token, session, extends=extends)
        account = self._directory.accounts().get(session.user_name) if session else None
        if session is None or account is None or account.credential != session.credential:
            return None
        return Identity(user=User(name=session.user_name, role=account.role), csrf_token=csrf_token_of(token))

    def _identity_of_proxy(self, name: str, token: str, session: Session | None, *, extends: bool) -> Identity:
        user = self._directory.user_of_proxy(name)
        if user is None:
            raise NotAdmitted
        if session and (session.user_name, session.credential) == (name, _PROXY_CREDENTIAL):
            return Identity(user=user, csrf_token=csrf_token_of(token))
        if not extends:
            return Identity(user=user, csrf_token="")
        token = self._sessions.create(user_name=name, credential=_PROXY_CREDENTIAL, now=self._clock())
        return Identity(user=user, csrf_token=csrf_token_of(token), new_session=token)

    def _token(self, connection: HTTPConnection) -> str:
        """Return the token of the cookie; empty if there is none, or none that was made here."""
        token = connection.cookies.get(self.cookie_name, "")
        return token if _TOKEN.fullmatch(token) else ""

    def _refuse(self, failure: LoginFailure, address: str) -> LoginFailure:
        # Without the name: users type their password into the wrong field.
        log.warning("dashboard.login_refused", reason=failure.name.lower(), address=address)
        return failure

    async def _in_thread(self, run: Callable[[], T]) -> T:
        return await to_thread.run_sync(run, limiter=self._redis_threads)


def csrf_token_of(session_token: str) -> str:
    """Return the token that proves that a form was made for this session. It does not reveal the session's token."""
    return hmac.digest(session_token.encode(), b"payready dashboard form", "sha256").hex()
