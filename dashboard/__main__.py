"""The role `dashboard`: `python -m dashboard` serves the pages. A proxy in front terminates TLS."""

import contextlib
import signal
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn

from config.log_config import configure_logging, log_start
from config.role_settings import require_settings_of_role
from config.settings import ConfigurationError, Settings, settings
from dashboard.application import Dashboard, build_app
from dashboard.dashboard_connection import DashboardConnection
from dashboard.now_feed import NowFeed
from dashboard.preparation import prepare_pages
from worker import metrics_server
from worker.runtime import build_runtime

MAX_DATABASE_CONNECTIONS = 4
"""People load few pages at a time. The other roles need the connections of the database."""
SERVER: dict[str, Any] = {
    "loop": "uvloop",
    "http": DashboardConnection,
    "ws": "none",
    "lifespan": "on",
    "access_log": False,
    "server_header": False,
    "log_config": None,
    # uvicorn would accept the client's address from a header of any connection of this host.
    # `dashboard.access.trusted_proxies` reads it.
    "proxy_headers": False,
    "timeout_graceful_shutdown": 5,
    "timeout_keep_alive": 620,  # as `web`, for proxies
    "limit_concurrency": 1000,  # more than `MAX_IDLE_CONNECTIONS`: idle connections must not occupy all
}


class DashboardServer(uvicorn.Server):
    """The server. At a signal to stop, the streams of live pages end: they would not by themselves."""

    def __init__(self, app: Dashboard) -> None:
        super().__init__(uvicorn.Config(app, **SERVER))
        self._feed: NowFeed = app.state.now_feed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        self._feed.close()
        super().handle_exit(sig, frame)


def serve_until_sigterm() -> None:
    """Serve until SIGTERM, then finish the requests in progress."""
    try:
        chosen = settings()
        require_settings_of_role(chosen, "dashboard")
        configure_logging(chosen)
        app = _build(chosen)
    except ConfigurationError as error:
        sys.exit(f"payready cannot start: {error}")
    log_start(chosen, "dashboard")
    if chosen.metrics_port:
        metrics_server.start_metrics_server(chosen.metrics_host, chosen.metrics_port)
    # uvicorn raises the signal again after its shutdown. The default action would make that look like a crash.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    prepare_pages(app)
    with contextlib.suppress(KeyboardInterrupt):
        DashboardServer(app).run([_open_listener(chosen)])


def _build(chosen: Settings) -> Dashboard:
    connections = min(MAX_DATABASE_CONNECTIONS, chosen.database_connections)
    return build_app(build_runtime(chosen.model_copy(update={"database_connections": connections})))


def _open_listener(chosen: Settings) -> socket.socket:
    """Return a listener. `::` listens on the addresses of both families."""
    is_ipv6 = ":" in chosen.dashboard_host
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    try:
        address = (chosen.dashboard_host, chosen.dashboard_port)
        return socket.create_server(address, family=family, dualstack_ipv6=is_ipv6 and chosen.dashboard_host == "::")
    except OSError as error:
        sys.exit(f"payready cannot start: PAYREADY_DASHBOARD_HOST and PAYREADY_DASHBOARD_PORT: {error}")


if __name__ == "__main__":
    serve_until_sigterm()
