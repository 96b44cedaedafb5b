"""payready on one machine: a Valkey server, a SQLite file, the simulator, and every role of the Procfile."""

import json
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from celery import Celery

from config.production_rules import DEMO_PASSWORD_HASH
from demo.processes import Processes, assign_free_port, procfile, responds

API_KEY, WEBHOOK_SECRET, FLOWER_LOGIN = "demo-api-key", "demo-webhook-secret", "demo:demo"
"""Not secret: every process listens on the loopback interface only, and production rejects the first two."""
DASHBOARD_LOGIN = "demo:demo"
DASHBOARD_USERS = f"demo:operator:{DEMO_PASSWORD_HASH}"
"""Production rejects it too."""
WORKER_ROLES = ("worker", "refresh")
METRICS_ROLES = ("web", *WORKER_ROLES, "beat", "dashboard")
"""Roles that serve metrics, each on its own port."""


@dataclass(frozen=True, kw_only=True)
class PreferredPorts:
    """Ports to use if they are free. Otherwise, and for None, any free port is used."""

    web: int | None = None
    flower: int | None = None
    dashboard: int | None = None
    simulator: int | None = None
    valkey: int | None = None


@dataclass(frozen=True, kw_only=True)
class DevStack:
    """A running stack and its addresses."""

    processes: Processes
    settings: Mapping[str, str]
    """The `PAYREADY_*` environment variables of all roles."""
    redis_url: str
    database_url: str
    web_url: str
    simulator_url: str
    flower_url: str
    dashboard_url: str
    metrics_urls: Mapping[str, str]
    """By role."""

    def request_simulator(self, path: str, put: Mapping[str, Any] | None = None) -> Any:
        """Send a GET request to the simulator, or a PUT request with this JSON, and return the JSON of the response."""
        body = None if put is None else json.dumps(put).encode()
        request = urllib.request.Request(  # noqa: S310 - our own loopback address
            self.simulator_url + path, body, method="GET" if put is None else "PUT"
        )
        with urllib.request.urlopen(request, timeout=5) as response:  # noqa: S310
            return json.load(response)


@contextmanager
def start_sqlite_dev_stack(
    folder: Path,
    check_interrupts: Callable[[], None],
    ports: PreferredPorts | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[DevStack]:
    """Run the stack until the block ends. `check_interrupts` is called while it starts, and may raise to stop it.

    Raises:
        StartOrExitError: a process did not start.
    """
    ports = ports or PreferredPorts()
    web, simulator, flower, dashboard, valkey = (
        assign_free_port(preferred)
        for preferred in (ports.web, ports.simulator, ports.flower, ports.dashboard, ports.valkey)
    )
    redis_url, database_url = f"redis://127.0.0.1:{valkey}/0", f"sqlite:///{folder}/payready.db"
    simulator_url = f"http://127.0.0.1:{simulator}"
    environ = {
        "PAYREADY_REDIS_URL": redis_url,
        "PAYREADY_DATABASE_URL": database_url,
        "PAYREADY_QUILTT_API_URL": simulator_url,
        "PAYREADY_QUILTT_AUTH_URL": simulator_url,
        "PAYREADY_QUILTT_API_KEY": API_KEY,
        "PAYREADY_WEBHOOK_SECRETS": WEBHOOK_SECRET,
        "PAYREADY_WEBHOOK_PORT": str(web),
        "PAYREADY_DRAIN_S": "0",
        "PAYREADY_DASHBOARD_PORT": str(dashboard),
        "PAYREADY_DASHBOARD_USERS": DASHBOARD_USERS,
        "PAYREADY_DASHBOARD_FLOWER_URL": f"http://127.0.0.1:{flower}",
        **(settings or {}),
    }
    with Processes(folder, environ, check_interrupts) as processes:
        stack = DevStack(
            processes=processes,
            settings=environ,
            redis_url=redis_url,
            database_url=database_url,
            web_url=f"http://127.0.0.1:{web}",
            simulator_url=simulator_url,
            flower_url=f"http://127.0.0.1:{flower}",
            dashboard_url=f"http://127.0.0.1:{dashboard}",
            metrics_urls={role: f"http://127.0.0.1:{assign_free_port()}/metrics" for role in METRICS_ROLES},
        )
        processes.valkey(valkey)
        processes.start("simulator", _simulator_command(simulator, stack.web_url))
        processes.run("release", procfile()["release"])
        _start_roles_and_wait_until_ready(stack, flower)
        yield stack


def _simulator_command(port: int, web_url: str) -> str:
    webhook = f"--webhook-url {web_url}/webhooks/quiltt --webhook-secret {WEBHOOK_SECRET}"
    return f"python -m simulator --port {port} {webhook} --api-key {API_KEY}"


def _start_roles_and_wait_until_ready(stack: DevStack, flower: int) -> None:
    processes = stack.processes
    for role, command in procfile().items():
        if role != "release":
            port = str(urlsplit(stack.metrics_urls[role]).port) if role in METRICS_ROLES else ""
            environ = {"FLOWER_PORT": str(flower), "FLOWER_BASIC_AUTH": FLOWER_LOGIN, "PAYREADY_METRICS_PORT": port}
            processes.start(role, command, **environ)
    processes.wait_for("simulator", lambda: responds(f"{stack.simulator_url}/healthz"))
    processes.wait_for("web", lambda: responds(f"{stack.web_url}/readyz"))
    processes.wait_for("dashboard", lambda: responds(f"{stack.dashboard_url}/readyz"))
    processes.wait_for("flower", lambda: responds(f"{stack.flower_url}/healthcheck"))
    with probe_if_worker_has_responded(stack.redis_url) as is_connected:
        for role in WORKER_ROLES:
            processes.wait_for(role, partial(is_connected, role))


@contextmanager
def probe_if_worker_has_responded(redis_url: str) -> Iterator[Callable[[str], bool]]:
    """Yield a function that returns whether a worker with this role in its name has responded, now or earlier."""
    app = Celery("payready-demo", broker=redis_url, set_as_current=False)
    seen: set[str] = set()

    def is_connected(name: str) -> bool:
        if name not in seen:
            replies = app.control.ping(timeout=0.3)
            seen.update(worker.partition("@")[0] for reply in replies for worker in reply)
        return name in seen

    try:
        yield is_connected
    finally:
        app.close()
