"""Start the roles of the Procfile, and what they need, as processes of this machine; stop all of them again."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from demo.embedded_valkey import Valkey

ROOT = Path(__file__).parent.parent
STOP_TIMEOUT_S = 15
"""How long processes have to finish what they are doing before they are killed."""
POLL_S = 0.05
PORTS = range(20_000, 32_000)
"""Where free ports are looked for: below those that systems give to outgoing connections, which could take one away
between the moment it is found free and the moment it is listened on."""


LOG_TAIL_CHARS = 2000
"""Characters of the log of a process that ended by itself that are told."""


class StartError(Exception):
    """A process did not come up, or did not stay; the message says which, and where its log is."""


_assigned_ports: set[int] = set()


def free_port(preferred: int | None = None) -> int:
    """A port of the loopback interface that nobody listens on just now: the one wished for if it is free.

    Without a wish, none is given twice: the first may not be listened on yet.
    """
    for port in [*([preferred] if preferred else []), *random.sample(PORTS, 50)]:
        if (port == preferred or port not in _assigned_ports) and _is_free(port):
            _assigned_ports.add(port)
            return port
    raise StartError(f"no free port was found from {PORTS.start} to {PORTS.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: what just closed is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def procfile(path: Path = ROOT / "Procfile") -> dict[str, str]:
    """The commands of a Procfile by role."""
    lines = (re.fullmatch(r"(\w+):\s*(.+)", line) for line in path.read_text().splitlines())
    return {match[1]: match[2] for match in lines if match}


class Processes:
    """Processes that live no longer than the `with` block; each logs to a file of its own in `folder`.

    `check` is called while waiting, and between two starts: what it raises ends the block. Who must not be interrupted
    anywhere else, lest a process be started and not noted, notes its signals and raises them there.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str], check: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self._check = check
        binaries = str(Path(sys.executable).parent)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PAYREADY_")}
        self._environ = {**inherited, "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}", **environ}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._valkeys: list[Any] = []
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.stop()

    def log_of(self, name: str) -> Path:
        """Where the process logs to."""
        return self.folder / f"{name}.log"

    def start(self, name: str, command: str, **environ: str) -> subprocess.Popen[bytes]:
        """Start a shell command in a process group of its own, so that Ctrl-C reaches only us."""
        self._check()
        with self.log_of(name).open("ab") as log:
            process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {command}"],
                cwd=ROOT,
                env={**self._environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running[name] = process
        return process

    def valkey(self, port: int, *, append_only: bool = True) -> "Valkey":
        """Start a Valkey server that keeps its data in `folder`.

        Raises:
            StartError: it is not installed.
        """
        self._check()
        try:
            from demo.embedded_valkey import Valkey  # noqa: PLC0415 - production does not have it
        except ImportError:
            raise StartError("there is no embedded Valkey here; install payready[embedded]") from None
        config = {"appendonly": "yes" if append_only else "no", "appendfsync": "everysec", "save": ""}
        server = Valkey(port=port, data_dir=self.folder / "valkey", persist=True, config=config)
        self._valkeys.append(server)
        server.start()
        return server

    def run(self, name: str, command: str) -> None:
        """Run a command to its end.

        Raises:
            StartError: it failed.
        """
        process = self.start(name, command)
        while process.poll() is None:
            self._check()
            time.sleep(POLL_S)
        del self._running[name]
        if process.returncode != 0:
            self._check()  # a signal to us may have reached it too, before it had a process group of its own
            raise StartError(f"{name} failed, see {self.log_of(name)}")

    def wait_for(self, name: str, ready: Callable[[], bool], timeout_s: float = 30) -> None:
        """Wait until `ready`.

        Raises:
            StartError: the process ended, or the time did.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            process = self._running.get(name)
            if process is not None and process.poll() is not None:
                raise self._exited_error(name, process)
            if time.monotonic() > deadline:
                raise StartError(f"{name} is not ready after {timeout_s:.0f} s, see {self.log_of(name)}")
            self._check()
            time.sleep(POLL_S)

    def check_all_running(self) -> None:
        """See that everything that was started runs, but for what was ended by `end`.

        Raises:
            StartError: something ended by itself; with the end of its log.
        """
        for name, process in list(self._running.items()):  # a copy: another thread may start and end processes
            if process.poll() is not None and self._running.get(name) is process:
                raise self._exited_error(name, process)
        if any(server.has_ended for server in self._valkeys):
            self._check()
            raise StartError(f"valkey ended by itself, see {self.folder / 'valkey'}")

    def _exited_error(self, name: str, process: subprocess.Popen[bytes]) -> StartError:
        self._check()  # a signal to us may have reached it too, before it had a process group of its own
        log = self.log_of(name)
        last_words = log.read_text(errors="replace")[-LOG_TAIL_CHARS:].rstrip()
        told = f":\n{last_words}" if last_words else ""
        return StartError(f"{name} ended with status {process.returncode}, see {log}{told}")

    def stop_process(self, name: str, how: signal.Signals) -> None:
        """Send a process group this signal, and wait until the process is gone.

        Raises:
            StartError: it was gone before.
        """
        process = self._running.pop(name)
        if process.poll() is not None:
            raise self._exited_error(name, process)
        _signal(process, how)
        process.wait()

    def stop(self) -> None:
        """Stop everything: politely, then by force."""
        running = list(self._running.values())
        for process in running:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                process.wait()
        self._running.clear()
        while self._valkeys:
            server = self._valkeys.pop()
            if server.is_running():
                server.stop()
            server.terminate()  # if it has started, and never answered


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)


def responds(url: str) -> bool:
    """Whether an HTTP GET of `url` succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - our own loopback addresses
            return True
    except (urllib.error.URLError, OSError):
        return False
