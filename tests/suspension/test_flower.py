"""Payments in a real Flower, as the Procfile starts it: started while they wait, then succeeded or failed."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from celery import Celery, chain

from demo.processes import assign_free_port, procfile, responds
from tests.support.system import API_KEY, SECRET, System, eventually
from tests.suspension.primitive_kit import Kit
from tests.suspension.primitive_runs import new_account_id, send_balance

pytestmark = pytest.mark.slow

LOGIN = ("watcher", "flowers-of-the-tests")
Info = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def flower(payready: System) -> Iterator[httpx.Client]:
    """Return a client with the login, once Flower receives the workers' events."""
    port = assign_free_port()
    environ = {"FLOWER_PORT": str(port), "FLOWER_BASIC_AUTH": ":".join(LOGIN)}
    payready.processes.start("flower", procfile()["flower"], **environ)
    payready.processes.wait_for("flower", lambda: responds(f"http://127.0.0.1:{port}/healthcheck"))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", auth=LOGIN, timeout=10) as client:
        eventually(lambda: _knows_new_task(client, payready))
        yield client


def _knows_new_task(flower: httpx.Client, payready: System) -> bool:
    """Run a task, and return whether Flower knows it."""
    task = payready.service.signature("payments.cancel", args=("unknown",), queue="payments").apply_async()
    task.get(timeout=10)
    return flower.get(f"/api/task/info/{task.id}").status_code == 200


@pytest.fixture
def info(flower: httpx.Client) -> Info:
    """Return a function that reads Flower's data of a task. They are empty while Flower does not know it."""

    def read(task_id: str) -> dict[str, Any]:
        response = flower.get(f"/api/task/info/{task_id}")
        return dict(response.json()) if response.status_code == 200 else {}

    return read


def test_flower_shows_the_wait_as_runtime(payready: System, service: Celery, flower: httpx.Client, info: Info) -> None:
    """STARTED with readable arguments, then SUCCESS or FAILURE with the result."""
    kit = Kit(service, "payments.initiate", "payments", new_account_id(), "flower", fails=False)
    released = kit.pay("released").apply_async()
    job = kit.note("job", returns=kit.job("failed") | {"timeout_s": 2})
    failed = chain(job, kit.initiate(), app=service).apply_async()
    for payment, arguments in ((released, "kwargs"), (failed, "args")):
        eventually(lambda payment=payment: info(payment.id).get("state") == "STARTED")  # type: ignore[misc]
        waiting = info(payment.id)
        assert waiting["name"] == "payments.initiate"
        assert waiting["worker"].startswith("worker@")
        assert kit.account_id in waiting[arguments]
        assert "flower/" in waiting[arguments]
        assert waiting["runtime"] is None

    eventually(lambda: info(failed.id)["state"] == "FAILURE")
    send_balance(payready, kit.account_id)
    eventually(lambda: info(released.id)["state"] == "SUCCESS")
    for payment, payment_id in ((released, "flower/released"), (failed, "flower/failed")):
        row = payready.payment(payment_id)
        assert info(payment.id)["runtime"] == pytest.approx(
            (row["resolved_at"] - row["requested_at"]).total_seconds(), abs=1
        )
        assert info(payment.id)["runtime"] > 1.5
    assert "'state': 'released'" in info(released.id)["result"]
    assert info(failed.id)["exception"].startswith("PaymentNotReady('timeout', 'no balance arrived within 2 s")
    names = {task["name"] for task in flower.get("/api/tasks?limit=10000").json().values()}
    assert not names & {"payments.expire", "payments.sweep"}  # two per second would displace payments from its memory


def test_task_list_shows_the_arguments_of_each_task(flower: httpx.Client) -> None:
    """They have the payment's id: people look for a payment, and not for a task."""
    columns = re.findall(r'<th data-column="(\w+)"', flower.get("/tasks").text)
    assert {"name", "uuid", "args", "kwargs", "state"} <= set(columns)


@pytest.mark.parametrize(
    "path", ["/", "/tasks", "/broker", "/task/x", "/api/tasks", "/api/workers", "/api/task/info/x"]
)
def test_pages_and_api_require_a_login(flower: httpx.Client, path: str) -> None:
    for auth in (None, ("watcher", "wrong")):
        response = httpx.get(flower.base_url.join(path), auth=auth)
        assert response.status_code == 401, response.text
    assert flower.get(path).status_code in {200, 404}


def test_pages_show_no_secret(flower: httpx.Client) -> None:
    """The secrets are the provider's key, the webhook's secret and Flower's password."""
    workers = flower.get("/api/workers?refresh=true").json()
    [worker] = [name for name in workers if name.startswith("worker@")]
    for path in ("/", "/tasks", "/broker", f"/worker/{worker}", "/api/tasks?limit=10000", "/api/workers"):
        page = flower.get(path)
        assert page.status_code == 200
        assert "worker@" in page.text or path in {"/broker", "/tasks"}
        assert not any(secret in page.text for secret in (API_KEY, SECRET, LOGIN[1]))
