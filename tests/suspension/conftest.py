"""One system for all tests of this folder: payready, the payments service, and the twin that never waits."""

from collections.abc import Iterator

import pytest
from celery import Celery, _state

from demo.processes import procfile
from tasks.suspension import is_result_only
from tests.support.servers import Postgres
from tests.support.system import System, system
from tests.suspension.primitive_runs import Received, Run, kill_between_resolution_and_delivery, send_balance

WORKER = procfile()["worker"] + " --include tests.suspension.hooks"
QUIET = "--pool threads --without-gossip --without-mingle --loglevel WARNING"
SERVICE = (
    f"celery -A tests.suspension.service:app worker --queues svc,celery --concurrency 4 --hostname service@%h {QUIET}"
)
TWIN = (
    "celery -A tests.suspension.service:twin worker --queues twin --concurrency 4 --hostname twin@%h "
    f"--include tests.suspension.hooks {QUIET}"
)


def start_worker(system: System) -> None:
    """Start payready's worker, with the payments team's module."""
    system.processes.start("worker", WORKER, SERVICE_URL=system.redis_url)


@pytest.fixture(autouse=True)
def _apps_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery gives each new app the tasks of all others in the process: not here, where apps are made for a test."""
    builtin = {add for add in _state._on_app_finalizers if add.__module__ == "celery.app.builtins"}
    monkeypatch.setattr(_state, "_on_app_finalizers", builtin)


@pytest.fixture(scope="session")
def payready(tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres) -> Iterator[System]:
    """All of payready, with every role running; its worker knows the payments team's new-style errbacks."""
    with system(tmp_path_factory.mktemp("continuation"), postgres_server.database(), "beat") as running:
        start_worker(running)
        running.processes.start("service", SERVICE, SERVICE_URL=running.redis_url)
        running.processes.start("twin", TWIN, SERVICE_URL=running.redis_url)
        running.start("web", "refresh")
        for name in ("worker", "service", "twin"):
            running.wait_for_consumer(name)
        yield running


@pytest.fixture(scope="session")
def received(payready: System) -> Received:
    """What the payments service's tasks wrote down."""
    return Received(payready)


@pytest.fixture(scope="session")
def runs(payready: System, received: Received) -> dict[str, Run]:
    """Every primitive with every outcome: of payready (`calm`), and of the twin."""
    calm = Run(payready, received, "calm", "payments.initiate", "payments")
    twin = Run(payready, received, "twin", "twin.initiate", "twin")
    calm.start()
    twin.start()
    calm.wait_until_all_wait()
    send_balance(payready, calm.account_id)
    twin.wait_until_over()
    calm.wait_until_over()
    return {"calm": calm, "twin": twin}


@pytest.fixture(scope="session")
def crashed(payready: System, received: Received, runs: dict[str, Run]) -> Run:
    """Return the same run with crashes.

    All of payready is killed while the payments wait. A worker is killed before it delivers the outcomes. Finally all
    outcomes are delivered again, as after a kill between a delivery and its mark.
    """
    run = Run(payready, received, "crashed", "payments.initiate", "payments")
    run.start()
    run.wait_until_all_wait()
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
    run.wait_until_over()
    run.make_due()  # as after a crash between delivery and mark
    run.wait_until_over(times=2)
    return run


@pytest.fixture
def service(payready: System) -> Celery:
    """Return the Celery application of the payments service."""
    return payready.service
