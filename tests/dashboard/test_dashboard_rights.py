"""The dashboard with exactly the rights that `docs/howto/limit-database-rights.md` lists for it."""

import re

import httpx
import psycopg
from pydantic import SecretStr

from config.clock import utc_now
from config.settings import Settings
from dashboard.application import build_app
from demo.processes import ROOT
from tests.dashboard.conftest import USERS, csrf_token_in, logged_in, serve
from tests.support.databases import migrate
from tests.support.servers import Postgres
from worker.ledger import dead_letters
from worker.ledger.engine import transaction
from worker.rules.unhandled_messages import DeadLetterReason, UnhandledMessage
from worker.runtime import build_runtime

GRANTS, _, DASHBOARD_GRANTS = re.findall(
    r"```sql\n(.*?)```", (ROOT / "docs/howto/limit-database-rights.md").read_text(), re.DOTALL
)
PAGES = (
    *("/", "/payments", "/payments?state=failed", "/provider", "/fees", "/fees/pending"),
    *("/dead-letters", "/quarantine", "/audit"),
)


def test_pages_and_an_action_need_no_more_rights_than_documented(postgres_server: Postgres, valkey_url: str) -> None:
    owner_url = postgres_server.database()
    suffix = owner_url.rsplit("_", 1)[1]
    migrate(owner_url)
    with psycopg.connect(owner_url, autocommit=True) as connection:
        for grants in (GRANTS, DASHBOARD_GRANTS):
            statements = grants.replace("payready_app", f"app_{suffix}")
            connection.execute(statements.replace("payready_dashboard", f"dashboard_{suffix}"))
    runtime = build_runtime(
        Settings(
            database_url=owner_url.replace("payready@", f"dashboard_{suffix}@"),
            redis_url=valkey_url,
            dashboard_users=SecretStr(USERS),
            instance=f"rights-{suffix}"[:32],
        )
    )
    message = UnhandledMessage(queue="payments", message=b"x", reason=DeadLetterReason.UNREADABLE, detail="not JSON")
    with transaction(runtime.engine) as tx:
        [stored] = dead_letters.store(tx, [message], utc_now())
    with serve(build_app(runtime)) as url, logged_in(url, "olivia") as client:
        for page in PAGES:
            assert client.get(page).status_code == httpx.codes.OK, page
        token = csrf_token_in(client.get("/payments").text)
        deleted = client.post("/dead-letters/actions/delete", data={"csrf_token": token, "id": stored})
        assert deleted.status_code == httpx.codes.SEE_OTHER, deleted.text
        assert stored in client.get("/audit").text
    runtime.engine.dispose()
