"""Jobs that the payments service sends again, because it has received no outcome.

A failover of Redis loses what the old master has not replicated: a job that no worker has accepted, or a callback that
payready has delivered. The service cannot distinguish the two. It sends the job again with the same payment id in a new
task, as Celery does by default: payready delivers an outcome once to each task.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tests.chaos.chaos_plan import PlannedJob
from tests.chaos.chaos_system import ChaosSystem

RESEND_AFTER_S = 50.0
"""Time from a message to its repetition: longer than the longest `timeout_s`, shorter than funds are held."""
INTERVAL_S = 5.0
"""Minimum time between two looks for overdue jobs."""


class Resender:
    """Sender of jobs without an outcome. `counts` has what payready knew about each when it was sent again."""

    def __init__(self, system: ChaosSystem) -> None:
        self._system = system
        self.pending: dict[str, PlannedJob] = {}
        """Messages without an outcome, by task id of the plan."""
        self.tasks: defaultdict[str, list[str]] = defaultdict(list)
        """Further tasks, by task id of the plan."""
        self.counts: Counter[str] = Counter()
        self._last_sent_at: dict[str, float] = {}
        self._last_sent_task: dict[str, str] = {}
        self._looked_at = 0.0
        self._first_task_of: dict[str, str] = {}

    def track(self, messages: Iterable[PlannedJob], now: float) -> None:
        """Expect an outcome for each of these messages that is a job."""
        for message in messages:
            if message.job is not None and message.task_id not in self._last_sent_at:
                self.pending[message.task_id], self._last_sent_at[message.task_id] = message, now
                self._last_sent_task[message.task_id] = message.task_id

    def receive(self, callbacks: Iterable[dict[str, Any]]) -> None:
        """Expect no more outcome for the tasks of these callbacks."""
        for line in callbacks:
            task_id = line["parent_id"]
            self.pending.pop(self._first_task_of.get(task_id, task_id), None)

    def send_overdue(self, now: float) -> None:
        """Send jobs again for which an outcome is overdue. Those that cannot be sent are tried again."""
        if now - self._looked_at < INTERVAL_S:
            return
        self._looked_at = now
        overdue = [task_id for task_id in self.pending if now - self._last_sent_at[task_id] > RESEND_AFTER_S]
        if not overdue:
            return
        delivered_at = {
            row["task_id"]: row["delivered_at"]
            for row in self._system.rows_if_available("SELECT task_id, delivered_at FROM outcome_delivery")
        }
        for task_id in overdue:
            new_id = f"{task_id}-resent{len(self.tasks[task_id]) + 1}"
            # Before it is sent: an error does not say whether the broker has the message.
            self.tasks[task_id].append(new_id)
            self._first_task_of[new_id] = task_id
            if not self._system.send([replace(self.pending[task_id], task_id=new_id)]):
                return
            self.counts[_kind(self._last_sent_task[task_id], delivered_at)] += 1
            self._last_sent_at[task_id], self._last_sent_task[task_id] = now, new_id


def _kind(task_id: str, delivered_at: dict[str, Any]) -> str:
    if task_id not in delivered_at:
        return "jobs not in the ledger"
    return "payments in progress" if delivered_at[task_id] is None else "callbacks that did not run"
