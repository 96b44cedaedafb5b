"""Serve the endpoint: `python -m webhook`. TLS is the business of the proxy in front."""

import signal
import sys
from importlib import import_module
from typing import Any

import uvicorn

from config.garbage_collection import freeze_gc, raise_gc_thresholds
from config.log_config import configure_logging
from config.settings import ConfigurationError, settings
from webhook.limited_connection import LimitedConnection
from worker import metrics_server

SERVER: dict[str, Any] = {
    "loop": "uvloop",
    "http": LimitedConnection,
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
    raise_gc_thresholds()
    try:
        chosen = settings()
    except ConfigurationError as error:
        sys.exit(f"payready cannot start: {error}")
    configure_logging(chosen)
    if chosen.metrics_port:
        metrics_server.start_metrics_server(chosen.metrics_host, chosen.metrics_port)
    group_committer = import_module("webhook.endpoint").group_committer
    freeze_gc()
    # It may come before uvicorn listens to it, and uvicorn raises it again when it has stopped. By itself it would end
    # the process with what is still to be told.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        uvicorn.run("webhook.endpoint:app", host=chosen.webhook_host, port=chosen.webhook_port, **SERVER)
    finally:
        group_committer.drain()


if __name__ == "__main__":
    main()
