"""Runs: every primitive, with every outcome, all at once; and what came of it, free of ids and names of runs."""

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
from tests.suspension.primitives import FAILED, PRIMITIVES, RELEASED, Kit, Outcome, Primitive
from tests.suspension.service import RECEIVED

_numbers = itertools.count(1)
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_OURS = re.compile(r"acct_never\d+|^(calm|twin|crashed)/")
_REFUSED = re.compile(r"(PaymentNotReady\(\W*insufficient_funds\W+).*\)")
PATIENCE_S = 15


def quiet_account() -> str:
    """The id of an account that nobody else uses, whose balance comes when the test says so."""
    return f"acct_never{next(_numbers):06d}"


def send_balance(system: System, account_id: str, **account: Any) -> None:
    """Have the provider's webhook delivered: a fresh balance of this account."""
    record = balance_record(new_id("bal"), account_id, Account(**account), "REFRESH", time.time())
    body = delivery_body([event_record("balance.created", record, account_id, time.time())], "SANDBOX")
    answer = system.simulator.post("deliver", body=json.loads(body))
    assert answer["status"] == 204, answer


@dataclass
class Received:
    """What the payments service's tasks wrote down, by tag."""

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
    account_id: str = field(default_factory=quiet_account)
    results: dict[str, Any] = field(default_factory=dict)
    payments: list[str] = field(default_factory=list)

    def tag(self, primitive: Primitive, outcome: Outcome) -> str:
        return f"{self.name}/{primitive.name.replace(' ', '-')}/{outcome}"

    def start(self) -> None:
        """Send all of them."""
        for primitive, outcome in itertools.product(PRIMITIVES, (RELEASED, FAILED)):
            tag = self.tag(primitive, outcome)
            kit = Kit(self.system.service, self.task, self.queue, self.account_id, tag, fails=outcome == FAILED)
            self.results[tag] = primitive.build(kit).apply_async()
            self.payments += kit.payments

    def replies(self) -> list[dict[str, Any]]:
        """The tasks of this run that wait, or waited."""
        query = (
            "SELECT task_id, payment_id, continuation, due_at, delivered_at FROM outcome_delivery"
            " WHERE payment_id LIKE :run"
        )
        return self.system.rows(query, run=f"{self.name}/%")

    def wait_until_all_wait(self) -> None:
        """Until every payment that begins to wait by itself does so."""

        def all_wait() -> bool:
            return {reply["payment_id"] for reply in self.replies()} >= set(self.payments)

        wait_until(all_wait, PATIENCE_S, "all payments wait")

    def wait_until_over(self, times: int = 1) -> None:
        """Until every note was called so many times, every result is there, and nothing is on its way."""
        try:
            wait_until(lambda: not self._missing(times), PATIENCE_S, self.name)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self._missing(times)[:20]} are missing") from None
        wait_until(self._nothing_on_its_way, PATIENCE_S, "nothing is on its way")

    def _missing(self, times: int) -> list[str]:
        missing = []
        for primitive, outcome in itertools.product(PRIMITIVES, (RELEASED, FAILED)):
            tag = self.tag(primitive, outcome)
            calls = Counter(note["mark"] for note in self.received[tag])
            # A chord that is sent again may find that its body was called already, and is content with that.
            again = primitive.expected(outcome) - primitive.once - primitive.joined - primitive.before(outcome)
            late = [mark for mark in primitive.expected(outcome) if calls[mark] < (times if mark in again else 1)]
            comes = primitive.has_result and not (primitive.hangs and outcome == FAILED)
            if comes and not self.results[tag].ready():
                late.append("its result")
            missing += [f"{tag}/{mark}" for mark in late]
        return missing

    def _nothing_on_its_way(self) -> bool:
        client = self.system.service.backend.client
        due = [reply for reply in self.replies() if reply["due_at"] is not None]
        return not due and not any(client.llen(queue) for queue in ("svc", "celery", "payments", "balances", "twin"))

    def make_due(self) -> None:
        """Bring forward what the sweep would do after a while: tell the outcomes that nobody noted as told."""
        told = text("UPDATE outcome_delivery SET due_at = now(), delivered_at = NULL WHERE payment_id LIKE :run")
        with self.system.engine.begin() as connection:
            connection.execute(told, {"run": f"{self.name}/%"})

    def calls(self, primitive: Primitive, outcome: Outcome) -> list[dict[str, Any]]:
        """The notes as they were called."""
        return self.received[self.tag(primitive, outcome)]

    def trace(self, primitive: Primitive, outcome: Outcome) -> dict[str, Any]:
        """What came of a primitive, with names in the place of ids."""
        tag = self.tag(primitive, outcome)
        notes = {note["id"]: note for note in self.received[tag]} | {
            reply["task_id"]: {"mark": reply["payment_id"].rpartition("/")[2], **_of_canvas(reply["continuation"])}
            for reply in self.replies()
            if reply["payment_id"].startswith(tag + "/")
        }
        names = {task_id: note["mark"] for task_id, note in notes.items()}
        result = _described(self.results[tag], names) if primitive.has_result else None
        return {"calls": sorted((_call(note, names, primitive) for note in notes.values()), key=repr), "result": result}


def kill_between_settling_and_telling(system: System, run: Run) -> None:
    """When the run's payments are settled, start a worker, and kill it when it asks who is to be told."""
    waiting = "SELECT payment_id FROM payment WHERE payment_id LIKE :run AND state = 'waiting'"
    wait_until(lambda: not system.rows(waiting, run=f"{run.name}/%"), PATIENCE_S, "the payments are settled")
    blocked = (
        "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        " AND query LIKE 'SELECT outcome_delivery.task_id%'"
    )
    with system.engine.connect() as table:
        table.execute(text("LOCK TABLE outcome_delivery IN ACCESS EXCLUSIVE MODE"))
        system.processes.start("worker", procfile()["worker"])
        wait_until(lambda: bool(system.rows(blocked)), PATIENCE_S, "the worker asks who is to be told")
        system.kill("worker")


def _of_canvas(continuation: dict[str, Any]) -> dict[str, Any]:
    return {name: continuation.get(name) for name in ("root_id", "parent_id", "group_index")}


def _call(note: dict[str, Any], names: dict[str, str], primitive: Primitive) -> dict[str, Any]:
    root, parent = (names.get(note.get(name) or "") for name in ("root_id", "parent_id"))
    kept = {name: value for name, value in note.items() if name not in ("tag", "id", "root_id", "parent_id")}
    if note["mark"] in primitive.payments:  # the twin writes down more of them than the ledger knows
        kept = {"mark": note["mark"], "group_index": note["group_index"]}
    if note["mark"] not in primitive.joined:  # of those it is the last one of several, whichever that is
        kept["parent"] = parent
    kept["root"] = root and "one of the first" if primitive.joined else root
    return dict(_plain(kept, names))


def _plain(value: Any, names: dict[str, str]) -> Any:
    """Names in the place of ids; of an outcome what the twin knows of it too."""
    if isinstance(value, dict):
        if {"payment_id", "state"} <= value.keys():
            value = {"payment": value["payment_id"].rpartition("/")[2], "state": value["state"]}
        return {key: _plain(part, names) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, names) for part in value]
    if isinstance(value, str):
        return _REFUSED.sub(r"\1)", _UUID.sub(lambda found: names.get(found[0], "?"), _OURS.sub("", value)))
    return value


def _described(result: Any, names: dict[str, str]) -> Any:
    """A result with its parents, and the names of its children."""
    if result is None:
        return None
    parent = _described(result.parent, names)
    if isinstance(result, GroupResult):
        return {"group": [_described(part, names) for part in result.results], "parent": parent}
    value = result.result
    return {
        "name": names.get(result.id),
        "state": result.state,
        "value": _plain(repr(value) if isinstance(value, Exception) else value, names),
        "children": [_names(child, names) for child in result.children or []],
        "parent": parent,
    }


def _names(result: Any, names: dict[str, str]) -> Any:
    if isinstance(result, AsyncResult):
        return names.get(result.id)
    return [_names(part, names) for part in result.results]
