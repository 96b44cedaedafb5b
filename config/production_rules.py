"""Values of settings that production refuses, each with the sentence that says what to write."""

import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import SecretStr

from config.setting_types import variable_name

DEMO_SECRET_PREFIX = "demo"  # noqa: S105 - it marks secrets, and is none
"""Secrets that start with this are for demonstrations. Production refuses them."""
DEMO_PASSWORD_HASH = "$argon2id$v=19$m=19456,t=1,p=1$3pPyj9N71dgnS0t3mQxwxQ$fKHSjYECcIFrSl/P01skz0DArEh7lXX4PuQDwDuzEWE"  # noqa: S105
"""Hash of the password of the demo's user of the dashboard, which is public. Production refuses it."""
EXAMPLE_PRICE_LIST = Path(__file__).with_name("price_list.toml").resolve()
"""The shipped price list. Its price of a production call is invented, so production refuses it."""
MIN_WEBHOOK_SECRET_CHARS = 16
"""A shorter webhook secret can be found by trying, from one signed delivery."""


def refuse_demo_secret(name: str, secret: SecretStr) -> None:
    """Raise `ValueError` for a secret of the demo."""
    if secret.get_secret_value().startswith(DEMO_SECRET_PREFIX):
        raise ValueError(f"{variable_name(name)} must be set in production, and not to a demo value")


def refuse_demo_or_short_secret(name: str, secret: SecretStr) -> None:
    """Raise `ValueError` for a webhook secret of the demo, or with fewer than `MIN_WEBHOOK_SECRET_CHARS`."""
    refuse_demo_secret(name, secret)
    if len(secret.get_secret_value()) < MIN_WEBHOOK_SECRET_CHARS:
        raise ValueError(
            f"{variable_name(name)} must have at least {MIN_WEBHOOK_SECRET_CHARS} characters in each secret in "
            "production; separate secrets by commas"
        )


def refuse_http_unless_loopback(name: str, url: str) -> None:
    """Raise `ValueError` for a URL without TLS to another host: its requests have the API key."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not _is_loopback(parts.hostname or ""):
        raise ValueError(f"{variable_name(name)} must begin with https:// in production: its requests have the API key")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def refuse_example_price_list(name: str, file: Path) -> None:
    """Raise `ValueError` for the shipped price list. Fee entries are append-only: an invented price stays for good."""
    if file.resolve() == EXAMPLE_PRICE_LIST:
        raise ValueError(
            f"{variable_name(name)} must be set in production, to a price list with your contract's prices"
        )
