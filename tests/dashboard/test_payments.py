"""The search for payments, the page of a payment, and its actions, in a served dashboard on both databases."""

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote, urlencode

import httpx
import pytest
from pydantic import HttpUrl, SecretStr
from redis import Redis
from sqlalchemy import update

from dashboard.page_links import payment_path, payments_path
from dashboard.pages import payment_page
from dashboard.pages.payment_action_page import read_timeline
from dashboard.pages.payment_page import ACTOR_TEXTS
from tasks import sending
from tests.dashboard.conftest import USERS
from tests.support.databases import Databases
from tests.support.failed_payments import MUST_ACT, NEEDED_SETTINGS, fail_for_each_reason, payment_id_of
from tests.support.in_process import SETTINGS, InProcessSystem, in_process_system, intake_request
from worker import flow
from worker.errors import FailureReason
from worker.ledger import archived_months, balance_report, payment_search
from worker.ledger.archived_months import ArchivedMonth
from worker.ledger.engine import read_snapshot, transaction
from worker.ledger.payment_situation import explain_payment
from worker.ledger.tables import PAYMENT
from worker.rules.payment_situations import Actor
from worker.runtime import Runtime

HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img/src=x>",
    "../../etc/passwd",
    "..",
    "a//b/?c=d&e#f%20g%2f",
    "{{7*7}}{%if",
    "cancel",
    "x" * 128,
)
"""Payment ids that a job may have: printable ASCII characters without spaces."""
TEXTS = ("<b>x</b>", "'\"", "a\u202eb", "\0", "\ud800", "ünï 😀", "{{7*7}}", "y" * 500)
"""Keys and values of metadata."""


@pytest.fixture
def payready(databases: Databases, valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessSystem]:
    """A system that the dashboard shows. Messages of the dashboard go to its Redis."""
    users = {"dashboard_users": SecretStr(USERS), "dashboard_flower_url": HttpUrl("https://flower.example/f/")}
    settings = SETTINGS.model_copy(update={**NEEDED_SETTINGS, **users, "redis_url": valkey_url})
    sending._redis.cache_clear()
    monkeypatch.setattr(sending, "settings", lambda: settings)
    with databases.create() as address, in_process_system(address, valkey_url, settings) as system:
        yield system
    sending._redis.cache_clear()


@pytest.fixture
def runtime(payready: InProcessSystem) -> Runtime:
    """The runtime of the dashboard."""
    return payready.rt


class Page(HTMLParser):
    """The text, the tags and the links of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: dict[str, str] = {}
        self.inputs: dict[str, str] = {}
        self._texts: list[str] = []
        self._href: str | None = None
        self.feed(html)
        self.text = re.sub(r" ([.,;])( |$)", r"\1\2", " ".join(" ".join(self._texts).split()))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        assert "style" not in values
        assert not [name for name in values if name.startswith("on")]
        self.tags.append(tag)
        if tag == "a":
            self._href = values.get("href")
        if tag == "input":
            self.inputs[values["name"]] = values.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "a":
            self._href = None

    def handle_data(self, data: str) -> None:
        self._texts.append(data)
        if self._href is not None:
            self.links[data.strip()] = self._href


def page_of(response: httpx.Response, status: int = 200) -> Page:
    assert response.status_code == status, response.text
    page = Page(response.text)
    assert "script" not in page.tags
    return page


def release(payready: InProcessSystem, payment_id: str, account_id: str = "acct_1", **job: Any) -> None:
    payready.initiate(payment_id, account_id, task_id=f"task-{payment_id}", **job)
    payready.run_tasks()
    payready.clock.advance(3)
    payready.balance(account_id, "500.00")
    payready.run_tasks()


# --- search -----------------------------------------------------------------------------------------------------------


def found(page: Page) -> list[str]:
    return [text for text, href in page.links.items() if href.startswith("/payments/")]


def test_search_finds_payments_by_each_condition(payready: InProcessSystem, operator: httpx.Client) -> None:
    release(payready, "pay_1", amount="25.00", metadata={"order": "A-17"})
    payready.clock.advance(60)
    release(payready, "pay_2", "acct_2")
    payready.initiate("pay_3", "acct_3", task_id="t3")
    cases: list[tuple[dict[str, str], list[str]]] = [
        ({}, ["pay_3", "pay_2", "pay_1"]),
        ({"payment_id": " pay_1 "}, ["pay_1"]),
        ({"account": "acct_2"}, ["pay_2"]),
        ({"task": "t3"}, ["pay_3"]),
        ({"state": "waiting"}, ["pay_3"]),
        ({"reason": "timeout"}, []),
        ({"amount": "25"}, ["pay_1"]),
        ({"since": "2026-11-22 12:00:30", "state": "released"}, ["pay_2"]),
        ({"until": "2026-11-22T13:00:30+01:00"}, ["pay_1"]),
        ({"resolved_since": "2026-11-22 12:00:30"}, ["pay_2"]),
        ({"resolved_until": "2026-11-22 12:00:30"}, ["pay_1"]),
        ({"delivery": "undelivered"}, []),
        ({"delivery": "undeliverable"}, []),
        ({"metadata_key": "order", "metadata_value": "A-17"}, ["pay_1"]),
        ({"payment_id": "\0", "account": ""}, []),
    ]
    for conditions, expected in cases:
        page = page_of(operator.get(payments_path(**conditions)))
        assert found(page) == expected, conditions
        assert page.inputs["account"] == conditions.get("account", "")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("state", "gone", "must be one of waiting, released, failed"),
        ("reason", "bad", "insufficient_funds"),
        ("amount", "1e5", "must be a decimal, such as 25.00"),
        ("since", "yesterday", "must be a day or a time"),
        ("resolved_since", "yesterday", "must be a day or a time"),
        ("delivery", "late", "must be one of undelivered, undeliverable"),
        ("until", "0001-01-01T00:00:00+23:00", "must be a day or a time"),
        ("metadata_key", "order", "needs its key and its value"),
        ("metadata_value", "A-17", "needs its key and its value"),
        ("after", "x", "must be the key"),
        ("acount", "acct_1", "acount is not a field of this search"),
        ("<b>", "x", "<b> is not a field of this search"),
    ],
)
def test_wrong_field_is_named_and_the_others_are_kept(
    operator: httpx.Client, field: str, value: str, message: str
) -> None:
    page = page_of(operator.get(payments_path(**{field: value, "account": "acct_'1\">"})), 400)
    assert message in page.text
    assert page.inputs["account"] == "acct_'1\">"
    assert page.inputs.get(field, value) == value or field == "after"


def test_next_page_keeps_the_conditions(payready: InProcessSystem, operator: httpx.Client) -> None:
    for number in range(60):
        payready.initiate(f"pay_{number:02}", "acct_1", metadata={"a&b": "c=d"})
        payready.clock.advance(1)
    payready.initiate("other", "acct_2")
    conditions = {"account": "acct_1", "metadata_key": "a&b", "metadata_value": "c=d"}
    first = page_of(operator.get(payments_path(**conditions)))
    second = page_of(operator.get(first.links["Next page"]))
    assert [*found(first), *found(second)] == [f"pay_{number:02}" for number in reversed(range(60))]
    assert "Next page" not in second.links
    assert second.inputs["metadata_key"] == "a&b"
    assert found(page_of(operator.get(second.links["First page"]))) == found(first)


def test_bounded_search_states_how_far_it_has_come_and_continues(
    payready: InProcessSystem, operator: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        payready.initiate(f"pay_{number}", f"acct_{number}", metadata={"order": str(number)})
        payready.clock.advance(60)
    monkeypatch.setattr(payment_search, "MAX_EXAMINED", 3)
    page = page_of(operator.get(payments_path(metadata_key="order", metadata_value="0")))
    assert "back to 2026-11-22 12:02:00Z" in page.text
    assert found(page) == []
    assert found(page_of(operator.get(page.links["Search older payments"]))) == ["pay_0"]


# --- find -------------------------------------------------------------------------------------------------------------


def test_find_goes_to_the_payment_the_payment_of_the_task_or_the_account(
    payready: InProcessSystem, operator: httpx.Client
) -> None:
    payready.initiate("..", "acct_1", task_id="task/1")
    cases = {
        " .. ": "/payments/?id=..",
        "task/1": "/payments/?id=..",
        "acct_1": "/payments?account=acct_1",
        "<x>": "/payments/%3Cx%3E",
        "\0": "/payments/%00",
        "": "/payments",
        "a\r\nSet-Cookie: b": "/payments/?id=a%0D%0ASet-Cookie%3A+b",
    }
    for text, target in cases.items():
        response = operator.get("/find", params={"q": text})
        assert (response.status_code, response.headers["location"]) == (303, target)


# --- a payment --------------------------------------------------------------------------------------------------------


def test_page_of_a_failed_payment_names_reason_and_acting_party(
    payready: InProcessSystem, operator: httpx.Client
) -> None:
    """For each reason that a payment can fail with: the page has the explanation of the command line."""
    fail_for_each_reason(payready)
    assert set(MUST_ACT) == set(FailureReason) - {FailureReason.CONFLICT}
    for reason, party in MUST_ACT.items():
        payment_id = payment_id_of(reason)
        page = page_of(operator.get(payment_path(payment_id)))
        with read_snapshot(payready.engine) as tx:
            timeline = read_timeline(tx, payready.rt.settings, payment_id)
        assert timeline is not None
        assert timeline.payment.reason == reason
        assert f"failed: {reason}" in page.text
        assert ACTOR_TEXTS[Actor(party)][0] in page.text
        explained = explain_payment(timeline, payready.clock.now)
        assert explained.sentence in page.text
        assert f"Next step: {explained.next_step}" in page.text
        assert timeline.outcome is not None
        assert timeline.outcome["detail"] in page.text
        assert f"order (metadata) order of {reason}" in page.text
        assert f"failed {reason}" in page.text, "the timeline has the resolution"


def test_page_shows_calculation_balances_fee_and_callbacks(payready: InProcessSystem, operator: httpx.Client) -> None:
    link = {"task": "shop.ship", "kwargs": {}, "options": {"task_id": "cb-1", "queue": "shop"}, "subtask_type": None}
    error = {**link, "task": "shop.refund", "options": {"task_id": "cb-2"}}
    job = {"payment_id": "p1", "account_id": "acct_1", "amount": "25.00", "buffer": {"fixed": "2.00"}}
    request = intake_request(job, {"id": "t1", "callbacks": [link], "errbacks": [error]})
    payready.queue.add(flow.accept_job(payready.rt, request, lambda _: []).follow_up)
    page = page_of(operator.get("/payments/p1"))
    assert "waiting" in page.text
    assert "link: shop.ship to be sent to queue shop as task cb-1, if released" in page.text
    assert "shop.refund" in page.text
    payready.run_tasks()
    payready.clock.advance(3)
    payready.balance("acct_1", "100.00", balance_id="bal_1")
    payready.run_tasks()
    page = page_of(operator.get("/payments/p1"))
    assert "released: sufficient" in page.text
    assert "Available funds 100.00 USD" in page.text
    assert "Needed: amount x 1 + 2.00, the buffer of the job 27.00 USD" in page.text
    assert "Left 73.00 USD" in page.text
    assert "decided the payment" in page.text
    assert "bal_1" in page.text
    assert "0.10 USD posted, charged to us by Quiltt" in page.text
    assert "link: shop.ship sent to queue shop as task cb-1" in page.text
    assert "shop.refund" not in page.text
    assert "25.00 USD until 2026-11-23 12:00:03Z" in page.text
    assert "at Quiltt: 3.0 s" in page.text


@pytest.mark.parametrize("payment_id", HOSTILE)
def test_hostile_ids_and_metadata_are_shown_as_text(
    payready: InProcessSystem, operator: httpx.Client, payment_id: str
) -> None:
    metadata = {text: [text] for text in TEXTS[:3]} | {f"k{n}": text for n, text in enumerate(TEXTS)}
    payready.initiate(payment_id, "acct_1", task_id=f"task {payment_id}", metadata=metadata)
    payready.run_tasks()
    listed = page_of(operator.get("/payments"))
    page = page_of(operator.get(listed.links[payment_id]))
    assert f"Payment {payment_id}" in page.text
    assert page.links[f"task {payment_id}"] == f"https://flower.example/f/task/{quote(f'task {payment_id}', safe='')}"
    for shown in ("<b>x</b>", "a\\u202eb", "\\x00", "ünï 😀", "{{7*7}}", "y" * 500):
        assert shown in page.text
    assert "\u202e" not in page.text
    assert not {"b", "img"} & set(page.tags)
    question = page_of(operator.get(page.links["Cancel the payment…"]))
    assert question.inputs["payment_id"] == payment_id
    response = operator.post(
        "/payment-actions/cancel", data={"payment_id": payment_id, "csrf_token": question.inputs["csrf_token"]}
    )
    assert response.status_code == 303
    page = page_of(operator.get(response.headers["location"]))
    assert "The payment is cancelled." in page.text
    assert f"Payment {payment_id}" in page.text


def test_job_that_this_release_would_reject_is_shown(payready: InProcessSystem, operator: httpx.Client) -> None:
    """An earlier release may have accepted it."""
    payready.initiate("p1", "acct_1")
    with transaction(payready.engine) as tx:
        tx.execute(update(PAYMENT).values(job={"payment_id": "p1", "account_id": "a b", "timeout_s": "soon"}))
    page = page_of(operator.get("/payments/p1"))
    assert "timeout_s soon funds_check (default) disabled" in page.text


def test_page_says_that_it_has_only_the_newest_balances(
    payready: InProcessSystem, operator: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the balances did nothing, and no row shows them."""
    monkeypatch.setattr(balance_report, "MAX_BALANCES", 2)
    monkeypatch.setattr(payment_page, "MAX_BALANCES", 2)
    payready.initiate("p1", "acct_1")
    pages = []
    for _ in range(3):
        payready.balance("acct_1")
        pages.append("the newest 2 of 3 balances" in page_of(operator.get(payment_path("p1"))).text)
    assert pages == [False, False, True]


@pytest.mark.parametrize("payment_id", [*HOSTILE, "\0", "\ufffd", "z" * 500, "acct\u202e", ""])
def test_unknown_payment_is_not_found_and_the_page_says_where_to_look(operator: httpx.Client, payment_id: str) -> None:
    page = page_of(operator.get(payment_path(payment_id)), 404)
    assert "The ledger has no payment with this id." in page.text
    assert "/dead-letters" in page.links.values()
    assert not {"b", "img"} & set(page.tags)


def test_archived_payment_names_its_archive(payready: InProcessSystem, operator: httpx.Client) -> None:
    archived = ArchivedMonth(
        month="2026-10",
        since=datetime(2026, 10, 1, tzinfo=UTC),
        until=datetime(2026, 11, 1, tzinfo=UTC),
        copied_at=datetime(2026, 11, 5, 6, tzinfo=UTC),
        folder="s3://archive/<2026>",
        manifest={},
        removed_at=None,
    )
    with transaction(payready.engine) as tx:
        archived_months.record_month(tx, archived, {})
        archived_months.insert_archived_payments(tx, ["pay_1"], archived.month)
    assert operator.get("/find", params={"q": "pay_1"}).headers["location"] == "/payments/pay_1"
    page = page_of(operator.get("/payments/pay_1"), 404)
    assert "archived on 2026-11-05 06:00:00Z, with s3://archive/<2026>" in page.text


# --- actions ----------------------------------------------------------------------------------------------------------


def act(operator: httpx.Client, action: str, payment_id: str) -> Page:
    """Ask, confirm, and return the page that follows."""
    question = page_of(operator.get(f"/payment-actions/{action}?{urlencode({'payment_id': payment_id})}"))
    return confirm(operator, action, question)


def confirm(operator: httpx.Client, action: str, question: Page) -> Page:
    fields = {name: question.inputs[name] for name in ("payment_id", "csrf_token")}
    response = operator.post(f"/payment-actions/{action}", data=fields)
    assert response.status_code == 303
    return page_of(operator.get(response.headers["location"]))


def audited(payready: InProcessSystem) -> list[tuple[str, ...]]:
    """Return user, action, subject and result of the audit's entries, the oldest first."""
    rows = payready.rows("SELECT * FROM audit JOIN audit_result USING (audit_id) ORDER BY audit_id")
    return [(row["user_name"], row["action"], row["subject"], row["result"]) for row in rows]


def test_viewer_reads_and_does_not_act(payready: InProcessSystem, viewer: httpx.Client) -> None:
    payready.initiate("p1", "acct_1")
    page = page_of(viewer.get("/payments/p1"))
    assert not [href for href in page.links.values() if href.startswith("/payment-actions")]
    assert "only an operator" in page_of(viewer.get("/payment-actions/cancel?payment_id=p1"), 403).text
    data = {"payment_id": "p1", "csrf_token": page.inputs["csrf_token"]}
    assert viewer.post("/payment-actions/cancel", data=data).status_code == 403
    assert payready.state_or_reason("p1") == "waiting"
    assert audited(payready) == []


def test_cancel_fails_the_payment_and_sends_its_delivery_to_a_worker(
    payready: InProcessSystem, operator: httpx.Client
) -> None:
    payready.initiate("p1", "acct_1", task_id="t1")
    page = act(operator, "cancel", "p1")
    assert "The payment is cancelled." in page.text
    assert payready.state_or_reason("p1") == "cancelled"
    with Redis.from_url(payready.rt.settings.redis_url, decode_responses=True) as redis:
        lists = [redis.lrange(key, 0, -1) for key in redis.scan_iter() if redis.type(key) == "list"]
        tasks = [json.loads(message)["headers"]["task"] for messages in lists for message in messages]
    assert tasks == ["outcomes.deliver"]
    assert audited(payready) == [("olivia", "payment.cancel", "p1", "cancelled")]
    assert len(flow.claim_deliveries(payready.rt, ["t1"])) == 1


def test_cancel_succeeds_without_a_broker(
    payready: InProcessSystem, operator: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep delivers the outcome."""
    payready.initiate("p1", "acct_1")
    monkeypatch.setattr(
        sending, "settings", lambda: payready.rt.settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    )
    assert "The payment is cancelled." in act(operator, "cancel", "p1").text
    payready.pass_time(11)
    assert payready.outcome("p1")["reason"] == "cancelled"


def test_payment_that_is_resolved_meanwhile_is_not_cancelled(payready: InProcessSystem, operator: httpx.Client) -> None:
    payready.initiate("p1", "acct_1")
    question = page_of(operator.get("/payment-actions/cancel?payment_id=p1"))
    payready.run_tasks()
    payready.balance("acct_1")
    payready.run_tasks()
    page = confirm(operator, "cancel", question)
    assert "Nothing was cancelled: the payment was resolved meanwhile." in page.text
    assert payready.state_or_reason("p1") == "released"
    again = page_of(operator.get("/payment-actions/cancel?payment_id=p1"), 409)
    assert "it is already resolved: released" in again.text


def test_redeliver_delivers_the_same_outcome_again(payready: InProcessSystem, operator: httpx.Client) -> None:
    release(payready, "p1")
    assert "A worker delivers it within seconds." in act(operator, "redeliver", "p1").text
    payready.run_maintenance()
    first, second = payready.delivered["task-p1"]
    assert first == second
    assert audited(payready) == [("olivia", "payment.redeliver", "p1", "redelivery_scheduled")]


def test_end_hold_ends_it_once(payready: InProcessSystem, operator: httpx.Client) -> None:
    release(payready, "p1", amount="25.00")
    question = page_of(operator.get("/payment-actions/end-hold?payment_id=p1"))
    assert "The funds hold is ended." in confirm(operator, "end-hold", question).text
    assert payready.payment("p1")["hold_until"] is not None
    page = confirm(operator, "end-hold", question)
    assert "Nothing was ended: the funds hold has ended meanwhile." in page.text
    assert [entry[-1] for entry in audited(payready)] == ["hold_ended", "no_hold"]
    assert "End the funds hold…" not in page.links
    assert "its funds hold has ended" in page_of(operator.get("/payment-actions/end-hold?payment_id=p1"), 409).text


@pytest.mark.parametrize("action", ["redeliver", "end-hold"])
def test_action_that_a_waiting_payment_does_not_allow_is_not_offered(
    payready: InProcessSystem, operator: httpx.Client, action: str
) -> None:
    payready.initiate("p1", "acct_1", amount="25.00")
    links = page_of(operator.get("/payments/p1")).links
    assert not [href for href in links.values() if action in href]
    page = page_of(operator.get(f"/payment-actions/{action}?payment_id=p1"), 409)
    assert "This is not possible for the payment" in page.text
    assert "payment_id" not in page.inputs


@pytest.mark.parametrize(
    ("path", "payment_id", "status"),
    [("cancel", "nope", 404), ("cancel", "\0", 404), ("cancel", "", 404), ("destroy", "p1", 404)],
)
def test_action_on_an_unknown_payment_is_not_found(
    payready: InProcessSystem, operator: httpx.Client, path: str, payment_id: str, status: int
) -> None:
    payready.initiate("p1", "acct_1")
    token = page_of(operator.get("/payment-actions/cancel?payment_id=p1")).inputs["csrf_token"]
    assert operator.get(f"/payment-actions/{path}", params={"payment_id": payment_id}).status_code == status
    data = {"payment_id": payment_id, "csrf_token": token}
    assert operator.post(f"/payment-actions/{path}", data=data).status_code == status


@pytest.mark.parametrize("token", [{}, {"csrf_token": "x"}])
def test_action_without_the_token_of_the_session_changes_nothing(
    payready: InProcessSystem, operator: httpx.Client, token: dict[str, str]
) -> None:
    payready.initiate("p1", "acct_1")
    response = operator.post("/payment-actions/cancel", data={"payment_id": "p1", **token})
    assert response.status_code == 403
    assert payready.state_or_reason("p1") == "waiting"
