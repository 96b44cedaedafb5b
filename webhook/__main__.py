"""The role `web`: `python -m webhook` serves the endpoint. A proxy in front terminates TLS."""

import contextlib
import os
import signal
import socket
import sys
from typing import Any

import uvicorn

from config.garbage_collection import collect_and_freeze_objects, raise_gc_thresholds
from config.log_config import configure_logging, log_start
from config.role_settings import require_settings_of_role
from config.settings import ConfigurationError, Settings, require_usable_platform_port, settings
from webhook.draining import DrainingServer
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
    # Longer than the idle time of proxies, Google's 600 s being the longest: a proxy that reuses a connection just as
    # `web` closes it loses a request. `MAX_IDLE_CONNECTIONS` bounds the number of idle connections.
    "timeout_keep_alive": 620,
    "limit_concurrency": 1000,  # connections; times the body limit this bounds the memory; more get 503
}


def _open_listeners_of_both_families_if_wildcard(settings: Settings) -> list[socket.socket] | None:
    """Return a listener for IPv4 and IPv6 if the address is `::`, else None: uvicorn would open one for IPv6 only."""
    if settings.webhook_host != "::":
        return None
    try:
        address = (settings.webhook_host, settings.webhook_port)
        return [socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=True)]
    except OSError as error:
        sys.exit(f"payready cannot start: PAYREADY_WEBHOOK_HOST and PAYREADY_WEBHOOK_PORT: {error}")


def serve_then_finish_follow_ups() -> None:
    """Serve until SIGTERM, then drain, and finish open requests and their follow-ups."""
    raise_gc_thresholds()
    try:
        chosen = settings()
        require_settings_of_role(chosen, "web")
        require_usable_platform_port(os.environ)
    except ConfigurationError as error:
        sys.exit(f"payready cannot start: {error}")
    configure_logging(chosen)
    log_start(chosen, "web")
    if chosen.metrics_port:
        metrics_server.start_metrics_server(chosen.metrics_host, chosen.metrics_port)
    # After logging is configured, and before the garbage collector is frozen.
    from webhook.endpoint import app  # noqa: PLC0415
    from webhook.wiring import draining, group_committer  # noqa: PLC0415

    collect_and_freeze_objects()
    # SIGTERM may arrive before uvicorn handles it, and uvicorn raises it again after its shutdown. The default action
    # would end the process before the follow-ups have run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        config = uvicorn.Config(app, host=chosen.webhook_host, port=chosen.webhook_port, **SERVER)
        server = DrainingServer(config, draining, drain_s=chosen.drain_s)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(_open_listeners_of_both_families_if_wildcard(chosen))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second SIGTERM ends the process at once
        group_committer.shut_down_after_follow_ups()


if __name__ == "__main__":
    serve_then_finish_follow_ups()
