"""Runs of every primitive with every outcome, and their calls and results without ids."""

import itertools
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from celery.result import AsyncResult, GroupResult
from sqlalchemy import text

from demo.processes import procfile
from simulator.quiltt_records import Account, balance_record, delivery_body, event_record, new_id
from tests.support.system import System, wait_until
from tests.suspension.primitive_kit import FAILED, RELEASED, Kit, Outcome, Primitive
from tests.suspension.primitives import PRIMITIVES
from tests.suspension.service import RECEIVED
from worker.ledger.compact_json import full_continuation
from worker.ledger.engine import transaction

_numbers = itertools.count(1)
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_RUN_IDS = re.compile(r"acct_never\d+|^(suspended|plain|crashed)/")
_FAILURE_DETAIL = re.compile(r"(PaymentNotReady\(\W*insufficient_funds\W+).*\)")
TIMEOUT_S = 15


def new_account_id() -> str:
    """Return the id of a new account, whose balance the simulator sends only when a test requests it."""
    return f"acct_never{next(_numbers):06d}"


def send_balance(system: System, account_id: str, **account: Any) -> None:
    """Make the simulator deliver a fresh balance of this account."""
    record = balance_record(new_id("bal"), account_id, Account(**account), "REFRESH", time.time())
    body = delivery_body([event_record("balance.created", record, account_id, time.time())], "SANDBOX")
    response = system.simulator.post("deliver", body=json.loads(body))
    assert response["status"] == 204, response


@dataclass
class Received:
    """Recorded calls of the payments service's tasks, by tag."""

    system: System
    _read: int = 0
    _notes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __getitem__(self, tag: str) -> list[dict[str, Any]]:
        for line in self.system.service.backend.client.lrange(RECEIVED, self._read, -1):
            self._read += 1
            note = json.loads(line)
            self._notes.setdefault(note["tag"], []).append(note)
        return self._notes.get(tag, [])


@dataclass
class Run:
    """Every primitive with every outcome, on one account, at the same time."""

    system: System
    received: Received
    name: str
    task: str
    queue: str
    account_id: str = field(default_factory=new_account_id)
    results: dict[str, Any] = field(default_factory=dict)
    payments: list[str] = field(default_factory=list)

    def tag(self, primitive: Primitive, outcome: Outcome) -> str:
        return f"{self.name}/{primitive.name.replace(' ', '-')}/{outcome}"

    def start(self) -> None:
        """Send all primitives with all outcomes."""
        for primitive, outcome in itertools.product(PRIMITIVES, (RELEASED, FAILED)):
            tag = self.tag(primitive, outcome)
            kit = Kit(self.system.service, self.task, self.queue, self.account_id, tag, fails=outcome == FAILED)
            self.results[tag] = primitive.build(kit).apply_async()
            self.payments += kit.payments

    def deliveries(self) -> list[dict[str, Any]]:
        """Return the outcome deliveries of this run."""
        columns = "task_id, payment_id, continuation, due_at, delivered_at"
        query = f"SELECT {columns} FROM outcome_delivery WHERE payment_id LIKE :run"
        return [
            {**row, "continuation": full_continuation(row["continuation"], row["task_id"])}
            for row in self.system.rows(query, run=f"{self.name}/%")
        ]

    def wait_until_all_are_waiting(self) -> None:
        """Wait until every payment that starts without another one is waiting."""

        def all_are_waiting() -> bool:
            return {delivery["payment_id"] for delivery in self.deliveries()} >= set(self.payments)

        wait_until(all_are_waiting, TIMEOUT_S, "all payments are waiting")

    def wait_until_completed(self, times: int = 1) -> None:
        """Wait until every note was called `times` times, every result is stored, and the queues are empty."""
        try:
            wait_until(lambda: not self._missing(times), TIMEOUT_S, self.name)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self._missing(times)[:20]} are missing") from None
        wait_until(self._queues_are_empty, TIMEOUT_S, "the queues are empty")

    def _missing(self, times: int) -> list[str]:
        missing = []
        for primitive, outcome in itertools.product(PRIMITIVES, (RELEASED, FAILED)):
            tag = self.tag(primitive, outcome)
            calls = Counter(note["mark"] for note in self.received[tag])
            # A redelivered chord does not call its body repeated.
            repeated = primitive.expected(outcome) - primitive.once - primitive.joined - primitive.before(outcome)
            absent = [mark for mark in primitive.expected(outcome) if calls[mark] < (times if mark in repeated else 1)]
            has_result = primitive.has_result and not (primitive.hangs and outcome == FAILED)
            if has_result and not self.results[tag].ready():
                absent.append("the result")
            missing += [f"{tag}/{mark}" for mark in absent]
        return missing

    def _queues_are_empty(self) -> bool:
        client = self.system.service.backend.client
        due = [delivery for delivery in self.deliveries() if delivery["due_at"] is not None]
        return not due and not any(client.llen(queue) for queue in ("svc", "celery", "payments", "balances", "plain"))

    def make_due(self) -> None:
        """Make all outcomes of the run undelivered and due, so that the sweep delivers them now."""
        update = text("UPDATE outcome_delivery SET due_at = now(), delivered_at = NULL WHERE payment_id LIKE :run")
        with self.system.engine.begin() as connection:
            connection.execute(update, {"run": f"{self.name}/%"})

    def calls(self, primitive: Primitive, outcome: Outcome) -> list[dict[str, Any]]:
        """Return the notes in the order of their calls."""
        return self.received[self.tag(primitive, outcome)]

    def trace(self, primitive: Primitive, outcome: Outcome) -> dict[str, Any]:
        """Return the calls and the result of a primitive, with names instead of ids."""
        tag = self.tag(primitive, outcome)
        notes = {note["id"]: note for note in self.received[tag]} | {
            delivery["task_id"]: {
                "mark": delivery["payment_id"].rpartition("/")[2],
                **_relations(delivery["continuation"]),
            }
            for delivery in self.deliveries()
            if delivery["payment_id"].startswith(tag + "/")
        }
        names = {task_id: note["mark"] for task_id, note in notes.items()}
        result = _describe(self.results[tag], names) if primitive.has_result else None
        return {"calls": sorted((_call(note, names, primitive) for note in notes.values()), key=repr), "result": result}


def kill_between_resolution_and_delivery(system: System, run: Run) -> None:
    """Start a worker after the payments are resolved, and kill it when it claims the deliveries."""
    waiting = "SELECT payment_id FROM payment WHERE payment_id LIKE :run AND state = 'waiting'"
    wait_until(lambda: not system.rows(waiting, run=f"{run.name}/%"), TIMEOUT_S, "the payments are resolved")
    is_claiming = "wait_event_type = 'Lock' AND query LIKE '%outcome_delivery%'"
    blocked = f"SELECT 1 FROM pg_stat_activity WHERE {is_claiming}"
    with transaction(system.engine) as tx:
        tx.execute(text("LOCK TABLE outcome_delivery IN ACCESS EXCLUSIVE MODE"))
        system.processes.start("worker", procfile()["worker"])
        wait_until(lambda: bool(system.rows(blocked)), TIMEOUT_S, "the worker claims deliveries")
        system.kill("worker")


def _relations(continuation: dict[str, Any]) -> dict[str, Any]:
    return {name: continuation.get(name) for name in ("root_id", "parent_id", "group_index")}


def _call(note: dict[str, Any], names: dict[str, str], primitive: Primitive) -> dict[str, Any]:
    root, parent = (names.get(note.get(name) or "") for name in ("root_id", "parent_id"))
    fields = {name: value for name, value in note.items() if name not in ("tag", "id", "root_id", "parent_id")}
    if note["mark"] in primitive.payments:  # the plain task notes more fields than the ledger has
        fields = {"mark": note["mark"], "group_index": note["group_index"]}
    if note["mark"] not in primitive.joined:  # a joined call has the last of several tasks as its parent
        fields["parent"] = parent
    fields["root"] = root and "one of the first" if primitive.joined else root
    return dict(_without_ids(fields, names))


def _without_ids(value: Any, names: dict[str, str]) -> Any:
    """Replace ids by names, and reduce an outcome to the fields that the plain task has too."""
    if isinstance(value, dict):
        if {"payment_id", "state"} <= value.keys():
            value = {"payment": value["payment_id"].rpartition("/")[2], "state": value["state"]}
        return {key: _without_ids(part, names) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_ids(part, names) for part in value]
    if isinstance(value, str):
        return _FAILURE_DETAIL.sub(r"\1)", _UUID.sub(lambda found: names.get(found[0], "?"), _RUN_IDS.sub("", value)))
    return value


def _describe(result: Any, names: dict[str, str]) -> Any:
    """Return a result with its parents and the names of its children."""
    if result is None:
        return None
    parent = _describe(result.parent, names)
    if isinstance(result, GroupResult):
        return {"group": [_describe(part, names) for part in result.results], "parent": parent}
    value = result.result
    return {
        "name": names.get(result.id),
        "state": result.state,
        "value": _without_ids(repr(value) if isinstance(value, Exception) else value, names),
        "children": [_names_of(child, names) for child in result.children or []],
        "parent": parent,
    }


def _names_of(result: Any, names: dict[str, str]) -> Any:
    if isinstance(result, AsyncResult):
        return names.get(result.id)
    return [_names_of(part, names) for part in result.results]
