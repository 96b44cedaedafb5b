"""payready as a system under test for the peers' `run.py`: `--sut path/to/benchmarks/sut_payready.py`.

The setup equals production: PostgreSQL with its defaults, Valkey with AOF everysec, one process per role of the
Procfile (including Flower, so events are on), and payready's own interpreter. The harness counts the outcome at the
latest possible time: `outcome_delivery.delivered_at`, after the outcome is committed *and* delivered.

Options (`--opt K=V`): `root` runs another tree, `python` sets its interpreter, ROLE=N starts N processes of a role (0:
none), `reply=link` delivers outcomes as messages instead of stored results, and `PAYREADY_X` sets a variable.
"""

import os
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from celery import Celery
from peerlib.adapter import Base, free_port, http_json, wait_port  # type: ignore[import-not-found]
from peerlib.pg import db_bytes, execute, start_postgres  # type: ignore[import-not-found]
from suts.sut_celery_poll import redis_binary  # type: ignore[import-not-found]

HERE = Path(__file__).resolve().parents[1]
POLL_S = 0.5
"""Interval of the outcome query. The harness polls ten times per second, which would add to payready's CPU."""
OUTCOMES = (
    "SELECT p.account_id, extract(epoch FROM r.delivered_at)::float8, p.state "
    "FROM outcome_delivery r JOIN payment p USING (payment_id) WHERE r.delivered_at > to_timestamp(%s)"
)


class _Introspection(BaseHTTPRequestHandler):
    """Key introspection, which the peers' stub lacks. It runs in the harness, once per process, and is not counted."""

    def do_POST(self) -> None:
        body = b'{"environment":{"mode":"PRODUCTION"}}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Payready(Base):  # type: ignore[misc]
    """Adapter of payready for the harness."""

    submit_threads = 4  # same as the Celery peers

    def start(self, workdir: str) -> None:
        """Start servers and roles, and wait until each is ready."""
        self.workdir, options = workdir, self.cfg.opts
        self.root = Path(options.get("root", HERE))
        self.dsn, self._asked, self._latest = start_postgres(self), 0.0, 0.0
        self._auth = ThreadingHTTPServer(("127.0.0.1", 0), _Introspection)
        threading.Thread(target=self._auth.serve_forever, daemon=True).start()
        broker_port, self.port = free_port(), free_port()
        self.url, self._redis_dir = f"redis://127.0.0.1:{broker_port}/0", Path(workdir) / "valkey"
        self._redis_dir.mkdir()
        persistence = ["--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxclients", "4000"]
        location = ["--port", broker_port, "--bind", "127.0.0.1", "--dir", self._redis_dir]
        valkey = self.spawn("valkey", [redis_binary(), *location, *persistence])
        wait_port(broker_port, valkey)
        self.names = {self.pg_proc.pid: "postgres", valkey.pid: "valkey"}
        self._start_roles()
        self.webhook_url = f"http://127.0.0.1:{self.port}/webhooks/quiltt"

    def _start_roles(self) -> None:
        options = self.cfg.opts
        interpreter = Path(options.get("python", HERE / ".venv/bin/python"))
        environ = {k: v for k, v in os.environ.items() if not k.startswith("PAYREADY_")} | {
            "PATH": f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.root),
            "PAYREADY_ENV": "production",
            "PAYREADY_REDIS_URL": self.url,
            "PAYREADY_DATABASE_URL": self.dsn,
            "PAYREADY_QUILTT_API_URL": self.cfg.stub_url,
            "PAYREADY_QUILTT_AUTH_URL": f"http://127.0.0.1:{self._auth.server_address[1]}",
            "PAYREADY_QUILTT_API_KEY": self.cfg.api_key,
            "PAYREADY_WEBHOOK_SECRETS": "only-web-has-the-real-one",
            "PAYREADY_WEBHOOK_PORT": str(self.port),
            "PAYREADY_PRICE_LIST_FILE": str(shutil.copy(self.root / "config" / "price_list.toml", self.workdir)),
            "PAYREADY_CALLS_PER_S": "10000",  # the stub has no limit, and the other engines do not limit calls
            "FLOWER_PORT": str(free_port()),
            "FLOWER_BASIC_AUTH": "bench:bench",
            **{k: v for k, v in options.items() if k.startswith("PAYREADY_")},
        }
        lines = (re.fullmatch(r"(\w+):\s*(.+)", line) for line in (self.root / "Procfile").read_text().splitlines())
        commands = {line[1]: line[2] for line in lines if line}
        release = self.spawn("release", ["/bin/sh", "-c", commands.pop("release")], env=environ, cwd=self.root)
        if release.wait() != 0:
            raise RuntimeError(f"the migrations failed, see {self.workdir}/release.log")
        for role, command in commands.items():
            for number in range(int(options.get(role, 1))):
                line = command.replace("@%h", f"{number}@%h")
                process = self.spawn(
                    f"{role}{number}",
                    ["/bin/sh", "-c", f"exec {line}"],
                    env=self._environ(role, environ),
                    cwd=self.root,
                )
                self.names[process.pid] = role
        wait_port(self.port)
        workers = sum(int(options.get(role, 1)) for role, line in commands.items() if " worker " in line)
        end = time.monotonic() + 60
        with Celery(broker=self.url) as app:
            while http_json("GET", self.port, "/readyz")[0] != 200 or len(app.control.ping(timeout=1)) < workers:  # noqa: PLR2004
                if time.monotonic() > end:
                    raise RuntimeError(f"the workers are not ready, see {self.workdir}")

    def _environ(self, role: str, environ: dict[str, str]) -> dict[str, str]:
        if role != "web":
            return environ
        # Production refuses the harness's webhook secret, which is too short.
        return {**environ, "PAYREADY_ENV": "development", "PAYREADY_WEBHOOK_SECRETS": self.cfg.secret}

    def stop(self) -> None:
        """Stop all processes."""
        super().stop()
        self._auth.shutdown()

    def client_state(self) -> dict[str, Any]:
        """Return the state that the client process needs."""
        return {"url": self.url, "timeout": int(self.cfg.timeout_s), "link": self.cfg.opts.get("reply") == "link"}

    def connect(self, state: dict[str, Any]) -> None:
        """Connect the client process: a payments service that shares only addresses with payready."""
        self.app = Celery("payments-service", broker=state["url"])
        self.app.conf.update(broker_transport_options={"visibility_timeout": 120})
        self.timeout, self.more = state["timeout"], {}
        if state["link"]:
            self.more = {"link": self.app.signature("service.execute", queue="service"), "ignore_result": True}

    def submit_one(self, account: str) -> None:
        """Enqueue one job from the client process and request its outcome."""
        job = {"payment_id": f"pay_{account}", "account_id": account, "amount": "25.00", "timeout_s": self.timeout}
        self.app.send_task("payments.initiate", kwargs=job, queue="payments", **self.more)

    def outcomes(self) -> dict[str, float]:
        """Return by account the time at which its payment's outcome was delivered."""
        if time.monotonic() - self._asked > POLL_S:
            for account, at, state in _rows(self.dsn, OUTCOMES, (self._latest - 1,)):
                self._latest = max(self._latest, at)
                if account not in self._outcomes:
                    self._outcomes[account] = at
                    self._failed += state != "released"
            self._asked = time.monotonic()
        return dict(self._outcomes)

    def fees(self) -> int:
        """Return the number of posted fee entries."""
        return int(execute(self.dsn, "SELECT count(*) FROM fee_entry WHERE state = 'posted'")[0])

    def recorded(self) -> int:
        """Return the number of released payments."""
        return int(execute(self.dsn, "SELECT count(*) FROM payment WHERE state = 'released'")[0])

    def storage_bytes(self) -> int:
        """Return the size of the database and of Valkey's files."""
        return int(db_bytes(self.dsn)) + sum(f.stat().st_size for f in self._redis_dir.rglob("*") if f.is_file())


def _rows(dsn: str, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    import psycopg  # noqa: PLC0415 - the client process does not need it

    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query, values).fetchall()


make = Payready
