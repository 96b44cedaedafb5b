"""The HTTP server of `/metrics`, `/healthz` and `/readyz`, one per process."""

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from config.log_config import get_logger

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = get_logger(__name__)

IDLE_CONNECTION_TIMEOUT_S = 10


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        super().__init__(address, handler)


class _QuietHandler(WSGIRequestHandler):
    timeout = IDLE_CONNECTION_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class prescribes the name
        """Log nothing: Prometheus makes a request every few seconds."""


def build_metrics_and_health_app(is_ready: Callable[[], bool]) -> "WSGIApplication":
    """Return the application for `/metrics`, `/healthz` (always 200) and `/readyz` (200 if `is_ready`, else 503)."""
    metrics_app = make_wsgi_app()

    def wsgi_app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                response: Iterable[bytes] = metrics_app(environ, start_response)
                return response
            case "/healthz":
                status = "200 OK"
            case "/readyz":
                status = "200 OK" if is_ready() else "503 Service Unavailable"
            case _:
                status = "404 Not Found"
        start_response(status, [("Content-Type", "text/plain")])
        return [status.encode()]

    return wsgi_app


def start_metrics_server(host: str, port: int, is_ready: Callable[[], bool] = lambda: True) -> int | None:
    """Start the server in a thread; return its port. Log an error and return None if the port cannot be bound.

    The role keeps working without metrics.
    """
    try:
        server = make_server(
            host,
            port,
            build_metrics_and_health_app(is_ready),
            server_class=_ThreadingServer,
            handler_class=_QuietHandler,
        )
    except OSError as error:
        log.error("metrics.server_not_started", host=host, port=port, error=str(error))
        return None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return int(server.server_port)
