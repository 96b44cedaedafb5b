"""The role `dashboard` as a process, beside the roles that process payments."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dashboard.access.password_hashes import hash_password
from demo.processes import assign_free_port, procfile, responds
from tests.browser import seeded_ledger
from tests.support.system import ROLES, System, system

OPERATOR, VIEWER, PASSWORD = "olga", "vera", "correct horse battery"
TIMEOUTS_S = range(600, 3600, 70)
"""Timeouts of waiting payments: none of them ends while the tests run."""


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """A running dashboard and the system that it shows."""

    url: str
    system: System

    def start(self) -> None:
        """Start the role, and wait until it is ready."""
        self.system.processes.start("dashboard", procfile()["dashboard"])
        self.system.processes.wait_for("dashboard", lambda: responds(f"{self.url}/readyz"))

    @contextmanager
    def while_killed(self) -> Iterator[None]:
        """Kill the role for the duration of the block."""
        self.system.kill("dashboard")
        try:
            yield
        finally:
            self.start()


@contextmanager
def live_dashboard(
    folder: Path, database_url: str, *roles: str, with_attacks: bool, timeouts_s: range = TIMEOUTS_S, **environ: str
) -> Iterator[Dashboard]:
    """Run all roles and further ones on a ledger of two weeks for the duration of the block."""
    port = assign_free_port()
    hashed = hash_password(PASSWORD)
    settings = {
        "PAYREADY_DASHBOARD_PORT": str(port),
        "PAYREADY_DASHBOARD_USERS": f"{OPERATOR}:operator:{hashed} {VIEWER}:viewer:{hashed}",
        "PAYREADY_FEE_CAP_PER_DAY": "500",
        "PAYREADY_FEE_CAP_PER_MONTH": "5000",
        **environ,
    }
    with system(folder, database_url, *ROLES, *roles, **settings) as running:
        running.start_service()
        seeded_ledger.send_jobs_and_wait_until_resolved(running)
        seeded_ledger.copy_payments_over_two_weeks(running.engine)
        seeded_ledger.send_waiting_jobs(running, timeouts_s)
        if with_attacks:
            seeded_ledger.insert_attacks(running.engine)
        dashboard = Dashboard(url=f"http://127.0.0.1:{port}", system=running)
        dashboard.start()
        yield dashboard
