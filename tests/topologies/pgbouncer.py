"""PgBouncer for the tests, from the system's package. Without the package these tests are skipped."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from demo.processes import assign_free_port
from tests.support.servers import SERVER_USER

SERVER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
UNAVAILABLE_REASON = "pgbouncer is not installed (Debian: pgbouncer)"
START_TIMEOUT_S = 10


class PgBouncer:
    """PgBouncer with transaction pooling in front of a PostgreSQL server, and otherwise with its defaults."""

    def __init__(self, folder: Path, database_url: str, *, connections: int, **more: object) -> None:
        self._direct = urlsplit(database_url)
        self._port = assign_free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = folder
        (folder / "users").write_text(f'"{self._direct.username}" ""\n')
        options = {
            "listen_addr": "127.0.0.1",
            "listen_port": self._port,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": folder / "users",
            "admin_users": self._direct.username,
            "pool_mode": "transaction",
            "default_pool_size": connections,
            "max_db_connections": connections,
            "max_client_conn": 1000,
            **more,
        }
        lines = "".join(f"{name} = {value}\n" for name, value in options.items())
        databases = f"[databases]\n* = host={self._direct.hostname} port={self._direct.port}\n"
        (folder / "pgbouncer.ini").write_text(f"{databases}[pgbouncer]\n{lines}")

    @property
    def url(self) -> str:
        """URL of the database through PgBouncer."""
        return self._direct._replace(netloc=f"{self._direct.username}@127.0.0.1:{self._port}").geturl()

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        with (self._folder / "log").open("ab") as log:
            command = [str(SERVER), "--quiet", str(self._folder / "pgbouncer.ini")]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", user=SERVER_USER)
        admin = self._direct._replace(netloc=f"{self._direct.username}@127.0.0.1:{self._port}", path="/pgbouncer")
        while True:
            try:
                psycopg.connect(admin.geturl(), autocommit=True, connect_timeout=START_TIMEOUT_S).close()
            except psycopg.OperationalError:
                if self._process.poll() is not None:
                    raise RuntimeError(f"PgBouncer did not start: {(self._folder / 'log').read_text()}") from None
            else:
                return

    def kill(self) -> None:
        """Kill the server, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def pgbouncer(database_url: str, *, connections: int = 10, **more: object) -> Iterator[PgBouncer]:
    """Run PgBouncer in front of a database for the duration of the block. `more` are further options of it."""
    with tempfile.TemporaryDirectory(prefix="payready-pgbouncer-") as folder:
        Path(folder).chmod(0o755)
        server = PgBouncer(Path(folder), database_url, connections=connections, **more)
        try:
            server.start()
            yield server
        finally:
            server.kill()
