"""Test helpers: a simulator process, and a webhook endpoint that stores the requests it receives."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from demo.processes import ROOT
from simulator.signing import sign

T = TypeVar("T")

TIMEOUT_S = 10.0
_POLL_INTERVAL_S = 0.01


def eventually(probe: Callable[[], T]) -> T:
    """Return the first true value of the probe. Raise AssertionError after 10 s without one."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (value := probe()):
        if time.monotonic() > deadline:
            raise AssertionError(f"still {value!r} after {TIMEOUT_S} s")
        time.sleep(_POLL_INTERVAL_S)
    return value


class Simulator:
    """Simulator process on a free loopback port, with its endpoints as methods. It stops with the `with` block."""

    def __init__(self, webhook_url: str, *, secret: str, api_key: str, options: Sequence[str] = ()) -> None:
        self.api_key = api_key
        arguments = ["--webhook-url", webhook_url, "--webhook-secret", secret, "--api-key", api_key]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "simulator", "--port", "0", *arguments, *options],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.url = self._read_first_line().split()[-1]
        self.http = httpx.Client(base_url=self.url, verify=False, timeout=TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Send this signal to the process and return its exit status."""
        self.http.close()
        self.process.send_signal(signal_number)
        with self.process:
            return self.process.wait(TIMEOUT_S)

    def refresh(self, account_id: str, api_key: str | None = None, timeout_s: float = TIMEOUT_S) -> httpx.Response:
        """Send a refresh call, which Quiltt bills."""
        headers = {"Authorization": f"Bearer {api_key or self.api_key}"}
        return self.http.post(f"/v1/accounts/{account_id}/balances/refresh", headers=headers, timeout=timeout_s)

    def graphql(self, variables: object, api_key: str | None = None) -> httpx.Response:
        """Send a balance query, which is free."""
        auth = ("p_simulator", api_key or self.api_key)
        return self.http.post("/v1/graphql", json={"query": "...", "variables": variables}, auth=auth)

    def graphql_account(self, account_id: str) -> Any:
        """Return the account as GraphQL shows it."""
        return self.graphql({"id": account_id}).json()["data"]["account"]

    def put(self, path: str, **values: object) -> Any:
        """Send `PUT /control/<path>` and return the body of the response."""
        return self.http.put(f"/control/{path}", json=values).raise_for_status().json()

    def post(self, path: str, **values: object) -> Any:
        """Send `POST /control/<path>` and return the body of the response."""
        return self.http.post(f"/control/{path}", json=values).raise_for_status().json()

    def calls(self, account_id: str) -> list[dict[str, Any]]:
        """Return the logged calls of one account."""
        return list(self._log(account_id)["calls"])

    def deliveries(self, account_id: str) -> list[dict[str, Any]]:
        """Return the logged delivery attempts with events of one account."""
        return list(self._log(account_id)["deliveries"])

    def summary(self) -> dict[str, Any]:
        """Return the counts over the log."""
        return dict(self.http.get("/control/summary").raise_for_status().json())

    def wait_for_webhooks(self) -> None:
        """Wait until no webhook is pending."""
        eventually(lambda: self.summary()["webhooks_pending"] == 0)

    def _log(self, account_id: str) -> dict[str, Any]:
        return dict(self.http.get("/control/log", params={"account": account_id}).raise_for_status().json())

    def _read_first_line(self) -> str:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            with self.process:
                raise RuntimeError(f"the simulator ended with status {self.process.wait()}")
        return line


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """One request to the webhook. Header names are in lower case."""

    path: str
    headers: dict[str, str]
    body: bytes

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the events in the body."""
        return [event["record"] for event in json.loads(self.body)["events"]]

    def is_signed_with(self, secret: str) -> bool:
        """Return whether this secret gives the request's signature."""
        return self.headers["quiltt-signature"] == sign(secret, self.headers["quiltt-timestamp"], self.body)


@dataclass(slots=True)
class WebhookInbox:
    """Webhook endpoint in a thread. The next responses use `response_statuses`; after these the status is 204."""

    received: list[ReceivedRequest] = field(default_factory=list)
    response_statuses: list[int] = field(default_factory=list)
    _server: ThreadingHTTPServer = field(init=False)

    def __post_init__(self) -> None:
        inbox = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                inbox._serve(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.block_on_close = False  # keep-alive connections stay open, so waiting for them would block
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """URL of the endpoint."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/webhooks/quiltt"

    def requests_about(self, account_id: str) -> list[ReceivedRequest]:
        """Return the received requests that contain the account id."""
        return [request for request in self.received if account_id.encode() in request.body]

    def wait_for_requests_about(self, account_id: str, count: int = 1) -> list[ReceivedRequest]:
        """Wait until `count` requests contain the account id, and return them."""
        eventually(lambda: len(self.requests_about(account_id)) >= count)
        return self.requests_about(account_id)

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(ReceivedRequest(request.path, headers, body))
        status = self.response_statuses.pop(0) if self.response_statuses else 204
        request.send_response(status)
        if status != 204:
            request.send_header("Content-Length", "0")
        request.end_headers()
