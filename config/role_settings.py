"""The secrets and addresses that each role needs. In production a role without one of them does not start.

A role needs no other secret, so that a deployment gives each role only what it uses.
"""

from collections.abc import Mapping
from typing import Literal

from config.setting_types import variable_name
from config.settings import ConfigurationError, Settings

Role = Literal["release", "web", "worker", "refresh", "beat", "flower", "dashboard"]
_VALUES: Mapping[str, str] = {
    "database_url": "the address of the ledger, such as postgresql://user:password@host/name",
    "redis_url": "the address of Redis, such as redis://user:password@host:6379/0",
    "quiltt_api_key": "Quiltt's API key secret",
    "webhook_secrets": "the secret of the webhook subscription at Quiltt",
}


def require_settings_of_role(settings: Settings, role: Role) -> None:
    """Raise `ConfigurationError` if this is production and a setting that the role needs is not set."""
    require_in_production(settings, *_needs(settings, role))


def _needs(settings: Settings, role: Role) -> tuple[str, ...]:
    match role:
        case "release":
            return ("database_url",)
        case "web":
            return ("database_url", "redis_url", "webhook_secrets")
        case "worker" | "refresh":
            return ("database_url", "redis_url", "quiltt_api_key")
        case "beat" | "dashboard":
            return ("database_url", "redis_url")
        case "flower":  # it reads only the broker
            return () if settings.broker_url else ("redis_url",)


def require_in_production(settings: Settings, *names: str) -> None:
    """Raise `ConfigurationError` if this is production and one of these settings is not set.

    Their defaults are those of a demonstration on one host: each host would have a ledger and a queue of its own.
    """
    for name in names:
        if settings.env == "production" and not is_set(settings, name):
            raise ConfigurationError(f"{variable_name(name)} must be set in production, to {_VALUES[name]}")


def is_set(settings: Settings, name: str) -> bool:
    """Return whether the environment has a value for this setting."""
    return name in settings.model_fields_set and getattr(settings, name) != ()
