"""Serve the endpoint: `python -m webhook`. TLS is the business of the proxy in front."""

import sys
from typing import Any

import uvicorn

from config.logs import configure_logging
from config.settings import ConfigurationError, settings
from webhook.connection import Connection
from worker import metrics

SERVER: dict[str, Any] = {
    "loop": "uvloop",
    "http": Connection,
    "ws": "none",
    "lifespan": "off",
    "access_log": False,
    "server_header": False,
    "log_config": None,
    "timeout_graceful_shutdown": 10,
    "limit_concurrency": 1000,  # times the cap on a body: what senders can make us hold; beyond it the answer is 503
}


def main() -> None:
    """Serve until SIGTERM, then finish what is under way."""
    try:
        chosen = settings()
    except ConfigurationError as error:
        sys.exit(f"payready cannot start: {error}")
    configure_logging(chosen)
    if chosen.metrics_port:
        metrics.serve(chosen.metrics_host, chosen.metrics_port)
    uvicorn.run("webhook.app:app", host=chosen.host, port=chosen.port, **SERVER)


if __name__ == "__main__":
    main()
