"""Which role needs which secrets, by the roles that `cli/setting_groups.py` names."""

from collections.abc import Mapping

from cli.setting_groups import ALL, SETTING_GROUPS
from config.setting_types import ENV_PREFIX

_SETTINGS = ("database_url", "redis_url", "quiltt_api_key", "webhook_secrets", "dashboard_users")
SECRETS = tuple(f"{ENV_PREFIX}{name.upper()}" for name in _SETTINGS)
"""Variables with a secret. Addresses contain passwords."""


def secrets_of(role: str) -> set[str]:
    """Return the secrets that a role reads. The doctor checks all but users; `release` only migrates the database."""
    if role == "release":
        return {f"{ENV_PREFIX}DATABASE_URL"}
    readers = {name: roles for restarts in SETTING_GROUPS.values() for name, roles in restarts.items()}
    if role == "doctor":
        return set(SECRETS) - {f"{ENV_PREFIX}DASHBOARD_USERS"}
    read = [name for name in _SETTINGS if readers[name] == ALL or f"`{role}`" in readers[name]]
    return {f"{ENV_PREFIX}{name.upper()}" for name in read}


def environ_of(role: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables without the secrets that the role does not need."""
    return {name: value for name, value in environ.items() if name not in set(SECRETS) - secrets_of(role)}
