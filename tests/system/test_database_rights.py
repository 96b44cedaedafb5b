"""All roles with exactly the rights that `docs/howto/limit-database-rights.md` lists."""

import json
import re
import shutil
from pathlib import Path

import psycopg
import pytest

from demo.processes import ROOT
from tests.support.databases import migrate
from tests.support.servers import Postgres
from tests.support.system import ROLES, system, wait_until

pytestmark = pytest.mark.slow
GRANTS, DELETE_GRANT, _DASHBOARD_GRANTS = re.findall(
    r"```sql\n(.*?)```", (ROOT / "docs/howto/limit-database-rights.md").read_text(), re.DOTALL
)


def test_roles_work_with_the_documented_rights(tmp_path: Path, postgres_server: Postgres) -> None:
    """Payments are released, fail and expire, and what cannot be parsed is stored. Pruning is skipped with one line.

    With the right to delete it is not skipped.
    """
    owner_url = postgres_server.database()
    role = "app_" + owner_url.rsplit("_", 1)[1]
    migrate(owner_url)
    with psycopg.connect(owner_url, autocommit=True) as connection:
        connection.execute(GRANTS.replace("payready_app", role))
    prices = shutil.copy(ROOT / "config" / "price_list.toml", tmp_path)
    production = {"PAYREADY_ENV": "production", "PAYREADY_PRICE_LIST_FILE": str(prices)}
    with system(tmp_path, owner_url.replace("payready@", f"{role}@"), **production) as payready:
        released = payready.initiate("pay_1", "acct_prompt1", amount="25.00")
        assert released.get(timeout=20)["state"] == "released"
        for name, account_id, reason in (
            ("pay_2", "acct_gone1", "account_not_found"),
            ("pay_3", "acct_never1", "timeout"),
        ):
            with pytest.raises(Exception, match=reason):
                payready.initiate(name, account_id, timeout_s=3).get(timeout=20)
        body = {"events": [{"type": "balance.created", "id": "evt_x", "record": {"id": 5}}]}
        payready.simulator.http.post("/control/deliver", json={"body": body}).raise_for_status()
        payready.service.send_task("payments.unknown", queue="payments", ignore_result=True)
        for table in ("quarantine", "dead_letter"):
            wait_until(
                lambda table=table: payready.rows(f"SELECT count(*) AS n FROM {table}") == [{"n": 1}],  # type: ignore[misc]
                10,
                f"{table} has a row",
            )
        payready.service.send_task("quarantine.prune", queue="maintenance", ignore_result=True)
        wait_until(lambda: _skipped(payready.processes.log_of("worker")) != [], 10, "pruning is skipped")
        assert sorted(_skipped(payready.processes.log_of("worker"))) == ["dead_letter", "quarantine"]
        with psycopg.connect(owner_url, autocommit=True) as connection:
            connection.execute(DELETE_GRANT.replace("payready_app", role))
            connection.execute("UPDATE quarantine SET received_at = '2020-01-01'")
        payready.service.send_task("quarantine.prune", queue="maintenance", ignore_result=True)
        wait_until(lambda: payready.rows("SELECT 1 FROM quarantine") == [], 10, "the old event is deleted")
        for name in ROLES:
            log = payready.processes.log_of(name).read_text()
            assert not re.search("Traceback|permission denied", log), log


def _skipped(log: Path) -> list[str]:
    events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [event["table"] for event in events if event["event"] == "retention.skipped"]
