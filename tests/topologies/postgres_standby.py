"""A PostgreSQL primary with a hot standby, which can be promoted."""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from tests.support.servers import Postgres
from tests.support.simulator import eventually


class PostgresPair:
    """A primary and its standby. Replication is asynchronous until `replicate_synchronously`."""

    def __init__(self, folder: Path) -> None:
        for name in ("primary", "standby"):
            (folder / name).mkdir()
        folder.chmod(0o755)  # another user runs the servers
        self.primary = Postgres(folder / "primary")
        self.name = self.primary.database().rsplit("/", 1)[1]
        self.standby = Postgres(folder / "standby", self.primary)

    @property
    def url(self) -> str:
        """Address of the database with both servers. A client connects to the one that accepts writes."""
        hosts = f"host=127.0.0.1,127.0.0.1&port={self.primary.port},{self.standby.port}"
        return f"postgresql://payready@/{self.name}?{hosts}&target_session_attrs=read-write"

    def url_of(self, server: Postgres) -> str:
        """Address of the database on one server."""
        return f"postgresql://payready@127.0.0.1:{server.port}/{self.name}"

    def replicate_synchronously(self) -> None:
        """Acknowledge a commit only when the standby has it. The standby itself, once promoted, waits for none."""
        self.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        self.execute("SELECT pg_reload_conf()")
        self.wait_until_synchronous()

    def wait_until_synchronous(self) -> None:
        """Wait until the standby acknowledges commits."""
        eventually(lambda: self.execute("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))

    def stop_replication(self) -> None:
        """Freeze the process that sends commits to the standby."""
        [(pid,)] = eventually(lambda: self.execute("SELECT pid FROM pg_stat_replication"))
        os.kill(pid, signal.SIGSTOP)

    def is_standby_up_to_date(self) -> bool:
        """Return whether the standby has all commits."""
        behind = "SELECT pid FROM pg_stat_replication WHERE flush_lsn < pg_current_wal_flush_lsn()"
        return not self.execute(behind)

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Execute a statement on the primary, and return its rows."""
        with psycopg.connect(self.url_of(self.primary), autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def fail_over(self) -> None:
        """Kill the primary, and promote the standby."""
        self.primary.kill()
        self.standby.promote()

    def rejoin(self) -> None:
        """Make the killed primary the synchronous standby of the promoted server, by a new base backup."""
        self.primary, self.standby = self.standby, self.primary
        self.standby.start_as_standby(self.primary)
        self.replicate_synchronously()


@contextmanager
def postgres_pair() -> Iterator[PostgresPair]:
    """Run both servers for the duration of the block."""
    with tempfile.TemporaryDirectory(prefix="payready-pair-") as folder:
        pair = PostgresPair(Path(folder))
        try:
            yield pair
        finally:
            pair.standby.stop()
            pair.primary.stop()
