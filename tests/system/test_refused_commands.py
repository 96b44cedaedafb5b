"""A Redis that refuses all commands for a while: it loads its data, or it names another node. All roles survive."""

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from demo.processes import procfile
from tests.support.refusing_proxy import RefusingProxy
from tests.support.servers import Postgres
from tests.support.system import ROLES, System, system, wait_until

pytestmark = [
    pytest.mark.slow,
    # kombu leaves the sockets of lost connections to the garbage collector, also in this process.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

REFUSALS = ["LOADING Redis is loading the dataset in memory", "MOVED 3999 127.0.0.1:1"]
REFUSED_WHILE_WORKING, REFUSED_AT_START = 20, 6
"""Commands: so many that the roles have tried again. At their start they wait longer between tries."""


@pytest.fixture
def proxied(tmp_path: Path, postgres_server: Postgres) -> Iterator[tuple[System, RefusingProxy]]:
    """Run a system whose roles reach Redis through a proxy. The payments service reaches it directly."""
    with (
        system(tmp_path, postgres_server.database(), "web") as running,
        closing(RefusingProxy(urlsplit(running.redis_url).port or 0)) as proxy,
    ):
        running.kill("web")
        running.start(*ROLES, PAYREADY_REDIS_URL=proxy.through(running.redis_url))
        yield running, proxy
        running.kill(*ROLES)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: re.split(r"\W", refusal)[0])
def test_roles_survive_a_redis_that_refuses_all_commands(proxied: tuple[System, RefusingProxy], refusal: str) -> None:
    """While they work, and while they start. Each payment is released once."""
    running, proxy = proxied
    with proxy.refusing(refusal):
        first = running.initiate("pay_1", "acct_prompt000001")
        wait_until(lambda: proxy.refused >= REFUSED_WHILE_WORKING, 20, "the roles are refused")
    assert first.get(timeout=30)["state"] == "released"
    running.kill("worker", "refresh", "beat")
    with proxy.refusing(refusal):
        for role in ("worker", "refresh", "beat"):
            running.processes.start(role, procfile()[role], PAYREADY_REDIS_URL=proxy.through(running.redis_url))
        second = running.initiate("pay_2", "acct_prompt000002")
        refused = proxy.refused
        wait_until(lambda: proxy.refused >= refused + REFUSED_AT_START, 20, "the roles that start are refused")
    assert second.get(timeout=30)["state"] == "released"
    delivered = "SELECT payment_id FROM outcome_delivery WHERE delivered_at IS NOT NULL"
    wait_until(lambda: len(running.rows(delivered)) == 2, 10, "both outcomes are delivered")
