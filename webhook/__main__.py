"""Serve the endpoint: `python -m webhook`. TLS, and limits on headers, are the business of the proxy in front."""

import sys

import uvicorn

from config.logs import configure_logging
from config.settings import ConfigurationError, settings
from worker import metrics


def main() -> None:
    """Serve until SIGTERM, then finish what is under way."""
    try:
        chosen = settings()
    except ConfigurationError as error:
        sys.exit(f"payready cannot start: {error}")
    configure_logging(chosen)
    if chosen.metrics_port:
        metrics.serve(chosen.metrics_host, chosen.metrics_port)
    uvicorn.run(
        "webhook.app:app",
        host=chosen.host,
        port=chosen.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        server_header=False,
        log_config=None,
        timeout_graceful_shutdown=10,
    )


if __name__ == "__main__":
    main()
