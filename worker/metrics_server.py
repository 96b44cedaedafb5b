"""What a process counts, and how it tells Prometheus. What the ledger knows is asked of the ledger, not counted here.

Each role is one process with threads, so the library's plain registry is right; replicas are summed by Prometheus.
Names begin with `payready_`, and no label is open-ended: never an account, never a payment.
"""

import logging
import threading
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

log = logging.getLogger(__name__)


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _SilentRequestHandler(WSGIRequestHandler):
    timeout = 10  # a connection on which nothing comes holds its thread no longer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is prescribed
        """A line a scrape would be too many."""


def start_metrics_server(host: str, port: int, is_ready: Callable[[], bool] = lambda: True) -> int | None:
    """Tell `/metrics`, `/healthz` (the process lives) and `/readyz` (it does its work) to whoever asks on this port.

    Returns the port that is listened on. None if it cannot be: that is logged, and is no reason not to work.
    """
    metrics = make_wsgi_app()

    def wsgi_app(environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start_response)
        status = {"/healthz": "200 OK", "/readyz": "200 OK" if is_ready() else "503 Service Unavailable"}
        said = status.get(path, "404 Not Found")
        start_response(said, [("Content-Type", "text/plain")])
        return [said.encode()]

    try:
        server = make_server(host, port, wsgi_app, server_class=_ThreadingServer, handler_class=_SilentRequestHandler)
    except OSError as error:
        log.error("no metrics are told, %s:%s cannot be listened on: %s", host, port, error)
        return None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return int(server.server_port)
