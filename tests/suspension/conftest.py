"""One system for all tests of this folder: payready, the payments service, and a plain task that does not wait."""

from collections.abc import Iterator

import pytest
from celery import Celery, _state

from demo.processes import procfile
from tasks.suspension import is_result_only
from tests.support.servers import Postgres
from tests.support.system import System, system
from tests.suspension.primitive_runs import Received, Run, kill_between_resolution_and_delivery, send_balance

WORKER = procfile()["worker"] + " --include tests.suspension.hooks"
OPTIONS = "--pool threads --without-gossip --without-mingle --loglevel WARNING"
SERVICE = (
    f"celery -A tests.suspension.service:app worker --queues svc,celery --concurrency 4 --hostname service@%h {OPTIONS}"
)
PLAIN = (
    "celery -A tests.suspension.service:plain worker --queues plain --concurrency 4 --hostname plain@%h "
    f"--include tests.suspension.hooks {OPTIONS}"
)


def start_worker(system: System) -> None:
    """Start payready's worker, with the payments team's module."""
    system.processes.start("worker", WORKER, SERVICE_URL=system.redis_url)


@pytest.fixture(autouse=True)
def _isolated_apps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give new apps no tasks of other apps in the process, as Celery does by default."""
    builtin = {add for add in _state._on_app_finalizers if add.__module__ == "celery.app.builtins"}
    monkeypatch.setattr(_state, "_on_app_finalizers", builtin)


@pytest.fixture(scope="session")
def payready(tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres) -> Iterator[System]:
    """Run all roles. The worker includes the payments team's new-style errback."""
    with system(tmp_path_factory.mktemp("continuation"), postgres_server.database(), "beat") as running:
        start_worker(running)
        running.processes.start("service", SERVICE, SERVICE_URL=running.redis_url)
        running.processes.start("plain", PLAIN, SERVICE_URL=running.redis_url)
        running.start("web", "refresh")
        for name in ("worker", "service", "plain"):
            running.wait_for_consumer(name)
        yield running


@pytest.fixture(scope="session")
def received(payready: System) -> Received:
    """Return the recorded calls of the payments service's tasks."""
    return Received(payready)


@pytest.fixture(scope="session")
def runs(payready: System, received: Received) -> dict[str, Run]:
    """Run every primitive with every outcome, with payready's task (`suspended`) and with a plain one (`plain`)."""
    suspended = Run(payready, received, "suspended", "payments.initiate", "payments")
    plain = Run(payready, received, "plain", "plain.initiate", "plain")
    suspended.start()
    plain.start()
    suspended.wait_until_all_are_waiting()
    send_balance(payready, suspended.account_id)
    plain.wait_until_completed()
    suspended.wait_until_completed()
    return {"suspended": suspended, "plain": plain}


@pytest.fixture(scope="session")
def crashed(payready: System, received: Received, runs: dict[str, Run]) -> Run:
    """Run every primitive with crashes.

    All roles are killed while the payments wait. A worker is killed before it delivers the outcomes. Finally all
    outcomes are delivered again, as after a kill between a delivery and its mark.
    """
    run = Run(payready, received, "crashed", "payments.initiate", "payments")
    run.start()
    run.wait_until_all_are_waiting()
    payready.kill("web", "worker", "refresh", "beat")
    payready.start("web")
    send_balance(payready, run.account_id)
    kill_between_resolution_and_delivery(payready, run)
    assert not any(
        delivery["delivered_at"] for delivery in run.deliveries() if not is_result_only(delivery["continuation"])
    )
    run.make_due()
    payready.start("beat", "refresh")
    start_worker(payready)
    run.wait_until_completed()
    run.make_due()  # as after a crash between delivery and mark
    run.wait_until_completed(times=2)
    return run


@pytest.fixture
def service(payready: System) -> Celery:
    """Return the Celery application of the payments service."""
    return payready.service
