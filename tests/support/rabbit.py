"""RabbitMQ server for the tests, from the system's package. Without the package these tests are skipped."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demo.processes import assign_free_port

SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""The server itself: the wrapper in the path requires a dedicated user."""
UNAVAILABLE_REASON = f"{SERVER} is not installed (Debian: rabbitmq-server)"
START_TIMEOUT_S = 60


class RabbitMQ:
    """One node on the loopback interface. Confirmed messages survive `kill` and `start`."""

    def __init__(self, folder: Path) -> None:
        self._port, self._epmd = assign_free_port(), assign_free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = folder
        for name in ("mnesia", "log", "home"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "plugins").write_text("[].")
        (folder / "rabbitmq.conf").write_text("log.console = false\n")
        self._environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder / "home"),
            "ERL_EPMD_PORT": str(self._epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"payready{self._port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self._port),
            "RABBITMQ_DIST_PORT": str(assign_free_port()),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        }

    @property
    def url(self) -> str:
        """URL of the broker."""
        return f"amqp://guest:guest@{self.address}//"

    @property
    def address(self) -> str:
        """Host and port of the broker."""
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start the server and wait until it listens."""
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(SERVER)],
                env=self._environ,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"RabbitMQ did not start; its log is in {self._folder}")
            time.sleep(0.1)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def kill(self) -> None:
        """Kill the server, as a crash would."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None

    @contextmanager
    def while_frozen(self) -> Iterator[None]:
        """Freeze the server for the duration of the block. Clients get neither a response nor an error."""
        if self._process is None:
            raise ProcessLookupError("the server is stopped")
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """Stop the server and the port mapper that it started."""
        self.kill()
        mapper, deadline = shutil.which("epmd"), time.monotonic() + 5
        while (
            mapper and time.monotonic() < deadline
        ):  # it refuses to stop until it notices that its last node has ended
            output = subprocess.run(
                [mapper, "-port", str(self._epmd), "-kill"], check=False, capture_output=True, timeout=5
            )
            if b"Killed" in output.stdout + output.stderr:
                return
            time.sleep(0.1)


@contextmanager
def rabbitmq(folder: Path) -> Iterator[RabbitMQ]:
    """Run a server for the duration of the block."""
    server = RabbitMQ(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
