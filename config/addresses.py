"""What addresses have in common: credentials, and how a log line shows none. Also the addresses of RabbitMQ."""

import re
from urllib.parse import urlsplit

AMQP_SCHEMES = ("amqp", "amqps")
_NEXT_ADDRESS = re.compile(r";(?=[A-Za-z0-9+.-]+://)")
"""Separator of several addresses, as kombu has it."""


def require_usable_amqp_addresses(name: str, urls: str) -> None:
    """Check addresses of RabbitMQ, separated by semicolons.

    Raises:
        ValueError: kombu cannot read one of them. The message repeats nothing of the addresses.
    """
    require_percent_encoded_credentials(name, urls)
    for url in urls.split(";"):
        if not _has_amqp_scheme_host_and_port(url):
            raise ValueError(
                f"{name} must be amqp://user:password@host:port/name, or several of them separated by semicolons; "
                "percent-encode special characters in the password"
            )


def _has_amqp_scheme_host_and_port(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in AMQP_SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def require_percent_encoded_credentials(name: str, urls: str) -> None:
    """Check that no /, ? or # is in the user or the password of an address.

    Otherwise clients disagree about where the password ends, and a log line could show a part of it.

    Raises:
        ValueError: an address has an @ after one of them.
    """
    if any("@" in _split(url)[1] for url in _NEXT_ADDRESS.split(urls)):
        raise ValueError(f"{name} must have no @ after the host; percent-encode special characters, such as %2F for /")


def without_credentials_and_query(urls: str) -> str:
    """Return scheme, host, port and path of an address, or of several. Everything that may be a secret is left out.

    A user, a password and the query string are dropped: PostgreSQL and Redis accept passwords in all three.
    """
    return ";".join(_without_credentials_and_query(url) for url in _NEXT_ADDRESS.split(urls))


def _without_credentials_and_query(url: str) -> str:
    authority, rest = _split(url)
    host = authority.rpartition("@")[2]
    return f"{url.partition('://')[0]}://{host}{re.split('[?#]', rest)[0]}"


def _split(url: str) -> tuple[str, str]:
    """Return the part with user, password and hosts, and the rest: path, query and fragment."""
    after_scheme = url.partition("://")[2]
    authority = re.split("[/?#]", after_scheme, maxsplit=1)[0]
    return authority, after_scheme.removeprefix(authority)
