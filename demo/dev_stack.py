"""All of payready on this machine: a Valkey, a SQLite file, the simulator, and every role of the Procfile."""

import json
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from celery import Celery

from demo.processes import Processes, free_port, procfile, responds

API_KEY, WEBHOOK_SECRET, FLOWER_LOGIN = "demo-api-key", "demo-webhook-secret", "demo:demo"
"""No secrets: all of it listens on the loopback interface only, and production refuses the first two."""
WORKER_ROLES = ("worker", "refresh")
METRICS_ROLES = ("web", *WORKER_ROLES, "beat")
"""Roles that tell Prometheus what they do, each on a port of its own."""


@dataclass(frozen=True)
class PreferredPorts:
    """Ports that are taken if they are free; otherwise, and without a wish, any free one is."""

    web: int | None = None
    flower: int | None = None
    simulator: int | None = None
    valkey: int | None = None


@dataclass(frozen=True)
class DevStack:
    """What is running, and where."""

    processes: Processes
    settings: Mapping[str, str]
    """The `PAYREADY_*` variables that all roles run with."""
    redis_url: str
    database_url: str
    web_url: str
    simulator_url: str
    flower_url: str
    metrics_urls: Mapping[str, str]
    """By role."""

    def request_simulator(self, path: str, put: Mapping[str, Any] | None = None) -> Any:
        """Ask the simulator, or tell it something, over HTTP."""
        body = None if put is None else json.dumps(put).encode()
        request = urllib.request.Request(  # noqa: S310 - our own loopback address
            self.simulator_url + path, body, method="GET" if put is None else "PUT"
        )
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
            return json.load(answer)


@contextmanager
def dev_stack(
    folder: Path,
    check_interrupts: Callable[[], None],
    ports: PreferredPorts | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[DevStack]:
    """Run everything for as long as the block does; `check` may raise to end it, at any moment.

    Raises:
        StartError: a process did not come up.
    """
    ports = ports or PreferredPorts()
    web, simulator, flower, valkey = (
        free_port(wish) for wish in (ports.web, ports.simulator, ports.flower, ports.valkey)
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
        **(settings or {}),
    }
    with Processes(folder, environ, check_interrupts) as processes:
        running = DevStack(
            processes,
            environ,
            redis_url,
            database_url,
            f"http://127.0.0.1:{web}",
            simulator_url,
            f"http://127.0.0.1:{flower}",
            {role: f"http://127.0.0.1:{free_port()}/metrics" for role in METRICS_ROLES},
        )
        processes.valkey(valkey)
        processes.start("simulator", _simulator_command(simulator, running.web_url))
        processes.run("release", procfile()["release"])
        _start_roles(running, flower)
        yield running


def _simulator_command(port: int, web_url: str) -> str:
    webhook = f"--webhook-url {web_url}/webhooks/quiltt --webhook-secret {WEBHOOK_SECRET}"
    return f"python -m simulator --port {port} {webhook} --api-key {API_KEY}"


def _start_roles(running: DevStack, flower: int) -> None:
    processes = running.processes
    for role, command in procfile().items():
        if role != "release":
            port = str(urlsplit(running.metrics_urls[role]).port) if role in METRICS_ROLES else ""
            environ = {"FLOWER_PORT": str(flower), "FLOWER_BASIC_AUTH": FLOWER_LOGIN, "PAYREADY_METRICS_PORT": port}
            processes.start(role, command, **environ)
    processes.wait_for("simulator", lambda: responds(f"{running.simulator_url}/healthz"))
    processes.wait_for("web", lambda: responds(f"{running.web_url}/readyz"))
    processes.wait_for("flower", lambda: responds(f"{running.flower_url}/healthcheck"))
    with connected_workers(running.redis_url) as up:
        for role in WORKER_ROLES:
            processes.wait_for(role, lambda role=role: up(role))  # type: ignore[misc]


@contextmanager
def connected_workers(redis_url: str) -> Iterator[Callable[[str], bool]]:
    """Gives a function that tells whether a worker of this name answers."""
    app = Celery("console", broker=redis_url, set_as_current=False)
    seen: set[str] = set()

    def up(name: str) -> bool:
        if name not in seen:
            replies = app.control.ping(timeout=0.3)
            seen.update(worker.partition("@")[0] for reply in replies for worker in reply)
        return name in seen

    try:
        yield up
    finally:
        app.close()
