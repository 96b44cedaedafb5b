"""Start the roles of the Procfile and their servers as processes on this machine, and stop them."""

import fcntl
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from demo.embedded_valkey import EmbeddedValkey

ROOT = Path(__file__).parent.parent
STOP_TIMEOUT_S = 15
"""Time between SIGTERM and SIGKILL."""
HANG_TIMEOUT_S = 40
"""Time after which a process that a signal should end counts as hung."""
POLL_S = 0.05
PORTS = range(20_000, 32_000)
"""Range of free ports, below the ephemeral ports: no outgoing connection takes one before its server binds it."""
LOG_TAIL_CHARS = 2000
"""Characters from the end of a log that an error message quotes."""
STACKS_CHARS = 30_000
"""The same for a hung process, which has logged the stacks of its threads."""


class StartOrExitError(Exception):
    """A process did not start, or exited; the message has its name and its log."""


_assigned_ports: set[int] = set()


def assign_free_port(preferred: int | None = None) -> int:
    """Return a free port of the loopback interface: the preferred one if it is free.

    A port that was not preferred is never returned twice, and no other process gets it before this one ends: its first
    user may not have bound it yet, or may have stopped for a moment.
    """
    for port in [*([preferred] if preferred else []), *random.sample(PORTS, 50)]:
        if (port == preferred or port not in _assigned_ports) and _lock_port(port) and _is_free(port):
            _assigned_ports.add(port)
            return port
    raise StartOrExitError(f"no free port found from {PORTS.start} to {PORTS.stop - 1}; end processes that use them")


def _lock_port(port: int) -> bool:
    """Lock a byte of a file that all processes of this user share. The kernel unlocks it when this one ends."""
    try:
        fcntl.lockf(_open_port_locks(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    return True


@cache
def _open_port_locks() -> int:
    """Return a file descriptor that stays open: closing it would unlock all ports."""
    path = Path(tempfile.gettempdir()) / f"payready-ports-{os.geteuid()}"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as servers do: a port that was just closed is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def procfile(path: Path = ROOT / "Procfile") -> dict[str, str]:
    """Return the commands of a Procfile by role."""
    lines = (re.fullmatch(r"(\w+):\s*(.+)", line) for line in path.read_text().splitlines())
    return {match[1]: match[2] for match in lines if match}


class Processes:
    """Processes that run until the `with` block ends. Each has its own log file in `folder`.

    `check` is called while waiting, and between two starts; its exception ends the block. Raise signals only there:
    elsewhere a process might be started and not be tracked.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str], check: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self._check = check
        binaries = str(Path(sys.executable).parent)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PAYREADY_")}
        path = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"
        self._environ = {**inherited, "PATH": path, "PYTHONFAULTHANDLER": "1", **environ}  # for `_abort_hung_process`
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
        """Return the log file of a process."""
        return self.folder / f"{name}.log"

    def start(self, name: str, command: str, **environ: str) -> subprocess.Popen[bytes]:
        """Start a shell command in its own process group, so that Ctrl-C reaches only this process."""
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

    def valkey(self, port: int, *, append_only: bool = True) -> "EmbeddedValkey":
        """Start a Valkey server with its data in `folder`.

        Raises:
            StartOrExitError: the embedded Valkey is not installed.
        """
        self._check()
        try:
            from demo.embedded_valkey import EmbeddedValkey  # noqa: PLC0415 - not installed in production
        except ImportError:
            raise StartOrExitError("the embedded Valkey is not installed; run `make setup`") from None
        config = {"appendonly": "yes" if append_only else "no", "appendfsync": "everysec", "save": ""}
        server = EmbeddedValkey(port=port, data_dir=self.folder / "valkey", persist=True, config=config)
        self._valkeys.append(server)
        server.start()
        return server

    def run(self, name: str, command: str) -> None:
        """Run a command and wait for its end.

        Raises:
            StartOrExitError: the command failed.
        """
        process = self.start(name, command)
        while process.poll() is None:
            self._check()
            time.sleep(POLL_S)
        del self._running[name]
        if process.returncode != 0:
            self._check()  # before it had its own process group, our signal may have reached it too
            raise StartOrExitError(f"{name} failed, see {self.log_of(name)}")

    def wait_for(self, name: str, ready: Callable[[], bool], timeout_s: float = 30) -> None:
        """Wait until `ready` returns True.

        Raises:
            StartOrExitError: the process exited, or the timeout is over.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            process = self._running.get(name)
            if process is not None and process.poll() is not None:
                raise self._exited_error_unless_interrupted(name, process)
            if time.monotonic() > deadline:
                raise StartOrExitError(f"{name} is not ready within {timeout_s:.0f} s, see {self.log_of(name)}")
            self._check()
            time.sleep(POLL_S)

    def check_all_running(self) -> None:
        """Check that every started process runs, except processes that `stop_running_process` ended.

        Raises:
            StartOrExitError: a process exited; the message has the end of its log.
        """
        for name, process in list(self._running.items()):  # a copy: another thread may start and end processes
            if process.poll() is not None and self._running.get(name) is process:
                raise self._exited_error_unless_interrupted(name, process)
        if any(server.has_exited_without_stop for server in self._valkeys):
            self._check()
            raise StartOrExitError(f"valkey exited, see {self.folder / 'valkey'}")

    def _exited_error_unless_interrupted(self, name: str, process: subprocess.Popen[bytes]) -> StartOrExitError:
        self._check()  # before it had its own process group, our signal may have reached it too
        tail = self._end_of_log(name, LOG_TAIL_CHARS)
        return StartOrExitError(f"{name} exited with status {process.returncode}, see {self.log_of(name)}{tail}")

    def _end_of_log(self, name: str, chars: int) -> str:
        tail = self.log_of(name).read_text(errors="replace")[-chars:].rstrip()
        return f":\n{tail}" if tail else ""

    def stop_running_process(self, name: str, how: signal.Signals) -> None:
        """Send a signal to a process group, and wait until the process has exited.

        Raises:
            StartOrExitError: the process had exited before, or it did not exit within `HANG_TIMEOUT_S`. Then the
                message has the stacks of its threads.
        """
        process = self._running.pop(name)
        if process.poll() is not None:
            raise self._exited_error_unless_interrupted(name, process)
        try:
            _signal(process, how)
            process.wait(HANG_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise self._abort_hung_process(name, process, how) from None
        finally:
            if process.returncode is None:  # the wait was interrupted
                self._running[name] = process

    def _abort_hung_process(self, name: str, process: subprocess.Popen[bytes], how: signal.Signals) -> StartOrExitError:
        """Make a Python process log its stacks and exit. Return the error to raise."""
        _signal(process, signal.SIGABRT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()
        tail = self._end_of_log(name, STACKS_CHARS)
        return StartOrExitError(f"{name} did not exit within {HANG_TIMEOUT_S} s of {how.name}{tail}")

    def stop(self) -> None:
        """Stop every process: SIGTERM, then SIGKILL after `STOP_TIMEOUT_S`."""
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
            server.terminate()  # also ends a server that never responded


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):  # another signal ended it before it had a group of its own
            os.killpg(process.pid, number)


def responds(url: str) -> bool:
    """Return whether an HTTP GET of `url` succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - our own loopback addresses
            return True
    except (urllib.error.URLError, OSError):
        return False
