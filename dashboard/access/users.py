"""Users of the dashboard and their roles."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from config.log_config import get_logger
from config.production_rules import DEMO_PASSWORD_HASH
from config.setting_types import variable_name
from config.settings import ConfigurationError, Settings
from dashboard.access.password_hashes import is_acceptable_hash

log = get_logger(__name__)
NO_PASSWORD = "-"  # noqa: S105 - it says that there is none
ANY_NAME = "*"
SEPARATOR = ","
"""Proxies join several headers of one name with it."""
_NAME = re.compile("[!-)+-9;-~][!-9;-~]{0,199}")
"""A name has visible ASCII characters without a colon, and does not begin with an asterisk."""
_FORM = "name:role:hash, with the role viewer or operator; `payready dashboard-user NAME` makes one"


class Role(StrEnum):
    """What a user may do."""

    VIEWER = "viewer"
    """Read all pages."""
    OPERATOR = "operator"
    """Also act: cancel payments, redeliver outcomes, apply invoices, delete dead letters."""


@dataclass(frozen=True, kw_only=True)
class User:
    """A user that has logged in."""

    name: str
    role: Role

    @property
    def is_operator(self) -> bool:
        """Whether the user may act."""
        return self.role == Role.OPERATOR


@dataclass(frozen=True, kw_only=True)
class Account:
    """A user as the settings have it."""

    role: Role
    password_hash: str | None
    """None: only the proxy can name the user."""

    @property
    def credential(self) -> str:
        """A digest that changes with the password."""
        return hashlib.sha256((self.password_hash or NO_PASSWORD).encode()).hexdigest()[:16]


def is_user_name(text: str) -> bool:
    """Return whether a user can have this name."""
    return _NAME.fullmatch(text) is not None


class UserDirectory:
    """The users of the settings and of the users file. A change of the file has effect at the next request."""

    def __init__(self, settings: Settings) -> None:
        """Read the users.

        Raises:
            ConfigurationError: a user or the file cannot be read, no user could log in, or production has the demo's
                user. No hash is repeated.
        """
        self._refused_hash = DEMO_PASSWORD_HASH if settings.env == "production" else None
        self._file = settings.dashboard_users_file
        self._of_settings = self._parse(settings.dashboard_users.get_secret_value().split(), "dashboard_users", {})
        self._file_version: object = "not read yet"
        self._accounts: Mapping[str, Account] = self._of_settings
        self._reread_changed_file()
        _require_a_way_in(self._accounts, has_proxy=settings.dashboard_proxy_user_header is not None)

    def accounts(self) -> Mapping[str, Account]:
        """Return the users by name. While the changed file has an error, its earlier users count, and it is logged."""
        try:
            self._reread_changed_file()
        except ConfigurationError as error:
            log.error("dashboard.users_file_invalid", error=str(error))
        return self._accounts

    def account_of_password(self, name: str) -> Account | None:
        """Return the user that may log in with a password."""
        account = self.accounts().get(name)
        return account if account and account.password_hash else None

    def hash_to_verify(self, name: str) -> str | None:
        """Return the hash of a user, or that of another one for a name without one. None: no user has a password.

        The name chooses the other user. So each name takes as long as the hash of some user, also if their costs
        differ, and always as long as before.
        """
        accounts = self.accounts()
        account = accounts.get(name)
        if account and account.password_hash:
            return account.password_hash
        hashes = sorted(each.password_hash for each in accounts.values() if each.password_hash)
        digest = hashlib.sha256("\0".join([name, *hashes]).encode(errors="replace")).digest()
        return hashes[int.from_bytes(digest[:8]) % len(hashes)] if hashes else None

    def user_of_proxy(self, name: str) -> User | None:
        """Return the user that the proxy names.

        A name with a comma must be listed: a proxy may have added its name to the header of a client.
        """
        accounts = self.accounts()
        account = accounts.get(name)
        if account is None and SEPARATOR not in name:
            account = accounts.get(ANY_NAME)
        return User(name=name, role=account.role) if account and is_user_name(name) else None

    def _reread_changed_file(self) -> None:
        if self._file is None:
            return
        version = _version(self._file)
        if version == self._file_version:
            return
        self._file_version = version
        self._accounts = self._parse(_lines(self._file), "dashboard_users_file", self._of_settings)

    def _parse(self, entries: Iterable[str], setting: str, others: Mapping[str, Account]) -> dict[str, Account]:
        accounts = _parse(entries, setting, others)
        for name, account in accounts.items():
            if account.password_hash and account.password_hash == self._refused_hash:
                raise ConfigurationError(
                    f"{variable_name(setting)}: user {name} must not have the demo's password in production; "
                    f"`payready dashboard-user {name} --role {account.role}` makes a user with another one"
                )
        return accounts


def _version(file: Path) -> object:
    try:
        stat = file.stat()
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _lines(file: Path) -> Iterator[str]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(f"{variable_name('dashboard_users_file')} must name a readable text file") from None
    return (line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#"))


def _parse(entries: Iterable[str], setting: str, others: Mapping[str, Account]) -> dict[str, Account]:
    """Return the other users with those of the entries."""
    accounts = dict(others)
    for number, entry in enumerate(entries, 1):
        where = f"{variable_name(setting)}: user {number}"
        name, _, rest = entry.partition(":")
        role, _, password_hash = rest.partition(":")
        if role not in tuple(Role) or not (is_user_name(name) or name == ANY_NAME):
            raise ConfigurationError(f"{where} must be {_FORM}")
        if name in accounts:
            raise ConfigurationError(f"{where} has the name of an earlier user; remove one of them")
        if password_hash == NO_PASSWORD:
            accounts[name] = Account(role=Role(role), password_hash=None)
        elif name == ANY_NAME:
            raise ConfigurationError(f"{where} must be *:{role}:-, because every user that the proxy names has it")
        elif is_acceptable_hash(password_hash):
            accounts[name] = Account(role=Role(role), password_hash=password_hash)
        else:
            raise ConfigurationError(f"{where} has no usable hash; `payready dashboard-user NAME` makes one")
    return accounts


def _require_a_way_in(accounts: Mapping[str, Account], *, has_proxy: bool) -> None:
    users, header = variable_name("dashboard_users"), variable_name("dashboard_proxy_user_header")
    if has_proxy and not accounts:
        raise ConfigurationError(f"{users} must name the users; write *:viewer:- for every user that the proxy names")
    if not has_proxy and not any(account.password_hash for account in accounts.values()):
        raise ConfigurationError(
            f"{users} must have a user with a password, from `payready dashboard-user NAME`, or set {header}"
        )
