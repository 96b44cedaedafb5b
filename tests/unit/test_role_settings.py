"""Each role starts in production with what it uses, and not without."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from config.role_settings import Role, require_in_production, require_settings_of_role
from config.settings import ConfigurationError, load_rejecting_unknown
from demo.processes import ROOT, procfile

PRODUCTION = {"PAYREADY_ENV": "production", "PAYREADY_PRICE_LIST_FILE": "/prices/price_list.toml"}
DATABASE = {"PAYREADY_DATABASE_URL": "postgresql://payready@127.0.0.1:1/x"}
REDIS = {"PAYREADY_REDIS_URL": "redis://127.0.0.1:1/0"}
API_KEY = {"PAYREADY_QUILTT_API_KEY": "qk_real"}
SECRETS = {"PAYREADY_WEBHOOK_SECRETS": "whsec_of_the_tests"}
NEEDS: Mapping[str, Mapping[str, str]] = {
    "release": DATABASE,
    "web": {**DATABASE, **REDIS, **SECRETS},
    "worker": {**DATABASE, **REDIS, **API_KEY},
    "refresh": {**DATABASE, **REDIS, **API_KEY},
    "beat": {**DATABASE, **REDIS},
    "dashboard": {**DATABASE, **REDIS},
    "flower": REDIS,
}
"""The settings without which a role does not start in production: `test_secrets_by_role` starts each with no other."""
SENTENCES = {
    "PAYREADY_DATABASE_URL": "the address of the ledger, such as postgresql://user:password@host/name",
    "PAYREADY_REDIS_URL": "the address of Redis, such as redis://user:password@host:6379/0",
    "PAYREADY_QUILTT_API_KEY": "Quiltt's API key secret",
    "PAYREADY_WEBHOOK_SECRETS": "the secret of the webhook subscription at Quiltt",
}


def test_every_role_is_tested() -> None:
    assert NEEDS.keys() == procfile().keys()


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, needs in NEEDS.items() for name in SENTENCES])
def test_role_requires_exactly_its_needs(role: Role, name: str) -> None:
    """A deployment gives it no other secret."""
    given = {**DATABASE, **REDIS, **API_KEY, **SECRETS, **PRODUCTION}
    settings = load_rejecting_unknown({key: value for key, value in given.items() if key != name})
    if name in NEEDS[role]:
        with pytest.raises(ConfigurationError) as error_info:
            require_settings_of_role(settings, role)
        assert str(error_info.value) == f"{name} must be set in production, to {SENTENCES[name]}"
    else:
        require_settings_of_role(settings, role)


def test_flower_needs_no_redis_with_another_broker() -> None:
    """It reads only the broker."""
    settings = load_rejecting_unknown({**PRODUCTION, "PAYREADY_BROKER_URL": "amqp://b"})
    require_settings_of_role(settings, "flower")


@pytest.mark.parametrize("role", NEEDS)
def test_role_without_a_need_exits_with_one_sentence(role: str, tmp_path: Path) -> None:
    """At its start: not with a traceback, and not at its first job."""
    *needs, missing = NEEDS[role]
    process = subprocess.run(
        ["/bin/sh", "-c", f"exec {procfile()[role]}"],
        cwd=ROOT,
        env={
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PAYREADY_ENV": "production",
            "PAYREADY_PRICE_LIST_FILE": str(shutil.copy(ROOT / "config" / "price_list.toml", tmp_path)),
            "FLOWER_BASIC_AUTH": "a:b",
            **{name: NEEDS[role][name] for name in needs},
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode not in (0, None)
    sentence = f"payready cannot start: {missing} must be set in production, to {SENTENCES[missing]}"
    assert process.stderr.strip() == sentence


def test_default_given_as_a_value_is_accepted() -> None:
    """SQLite and a Redis on this host are a choice, if they are chosen."""
    environ = {
        **PRODUCTION,
        "PAYREADY_DATABASE_URL": "sqlite:///payready.db",
        "PAYREADY_REDIS_URL": "redis://127.0.0.1:6379/0",
        "PAYREADY_WEBHOOK_SECRETS": " , ",
    }
    settings = load_rejecting_unknown(environ)
    require_in_production(settings, "database_url", "redis_url")
    with pytest.raises(ConfigurationError, match="PAYREADY_WEBHOOK_SECRETS must be set in production"):
        require_in_production(settings, "webhook_secrets")


def test_development_requires_nothing() -> None:
    """The demo's defaults serve."""
    require_in_production(load_rejecting_unknown({}), "database_url", "redis_url", "quiltt_api_key", "webhook_secrets")
