"""How a client connects to the provider: the certificates that it trusts, and a proxy if one is configured."""

import ssl
from pathlib import Path
from typing import Any

import httpx


def trusted_certificates(ca_file: Path | None) -> ssl.SSLContext:
    """Return a TLS context that trusts the authorities of `ca_file`, or the public ones. It reads no variable."""
    return httpx.create_ssl_context(trust_env=False) if ca_file is None else ssl.create_default_context(cafile=ca_file)


def proxy_or_none(url: str | None, ssl_context: ssl.SSLContext) -> httpx.Proxy | None:
    """Return the proxy at `url`. It authenticates with the user and the password of the URL."""
    return None if url is None else httpx.Proxy(url, ssl_context=ssl_context if url.startswith("https://") else None)


class TunnelObserver:
    """Observes by httpx' extension `trace` whether a call through a proxy has left the tunnel's entrance.

    Before `is_open` the proxy has received only the request for a tunnel, and the provider nothing. Until then the
    connect timeout limits each read, afterwards the read timeout.
    """

    def __init__(self, timeouts: dict[str, float | None]) -> None:
        self.is_open = False
        self._timeouts, self._read_timeout_s = timeouts, timeouts["read"]
        timeouts["read"] = timeouts["connect"]  # the connection reads this dictionary

    def __call__(self, event: str, info: dict[str, Any]) -> None:
        """Process one event of httpx."""
        if event == "http11.send_request_headers.started" and info["request"].method != b"CONNECT":
            self.is_open = True
            self._timeouts["read"] = self._read_timeout_s
