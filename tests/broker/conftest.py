"""All roles on each broker, with a short visibility timeout."""

import re
from collections.abc import Iterator

import pytest

from tests.support.rabbit import SERVER, UNAVAILABLE_REASON, rabbitmq
from tests.support.servers import Postgres
from tests.support.system import System, system

VISIBILITY_TIMEOUT_S = 7
"""As short as the other settings of the tests allow."""
RETRIES = 'payready_retried_tasks_total{task="payments.initiate"}'
OLDEST_S = 'payready_queue_oldest_seconds{queue="payments"}'

_WITH_RABBITMQ = pytest.mark.skipif(not SERVER.exists(), reason=UNAVAILABLE_REASON)


@pytest.fixture(
    scope="module",
    params=[
        "redis",
        pytest.param("rabbitmq", marks=pytest.mark.skipif(not SERVER.exists(), reason=UNAVAILABLE_REASON)),
    ],
)
def payready_on_each_broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres
) -> Iterator[System]:
    """Run all roles of payready on PostgreSQL, and Redis or RabbitMQ."""
    folder = tmp_path_factory.mktemp("payready")
    database, environ = postgres_server.database(), {"PAYREADY_VISIBILITY_TIMEOUT_S": str(VISIBILITY_TIMEOUT_S)}
    if request.param == "redis":
        with system(folder, database, **environ) as running:
            yield running
    else:
        with (
            rabbitmq(folder / "rabbitmq") as server,
            system(folder, database, PAYREADY_BROKER_URL=server.url, **environ) as running,
        ):
            yield running


def retried_tasks(payready: System) -> list[str]:
    """Return the task of each line that says that the worker tries it again."""
    return re.findall(r"task\.retried .*\btask_id=(\S+)", payready.processes.log_of("worker").read_text())
