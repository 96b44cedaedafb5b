"""Debits of the payments service in a chaos test: some time after its callback, a released payment is debited.

The payments service is idempotent on the payment id. Some time after the debit it may end the funds hold.
"""

import heapq
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.chaos.chaos_plan import ChaosPlan
from tests.chaos.chaos_system import ChaosSystem

RELEASED_TASK = "ledger.execute_ach"
_INTERVAL_S = 0.05
_RETRY_AFTER_S = 0.3


class CallbackLog:
    """Reader of the payments service's log, which returns each line once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0

    def new_lines(self) -> list[dict[str, Any]]:
        """Return the complete lines that were written since the last read."""
        if not self._path.exists():
            return []
        with self._path.open() as log:
            log.seek(self._read_bytes)
            text = log.read()
        complete_lines = text[: text.rfind("\n") + 1]
        self._read_bytes += len(complete_lines.encode())
        return [json.loads(line) for line in complete_lines.splitlines()]


class BankTransfers:
    """Thread that debits and credits the bank as planned, and ends holds. `counts` has what it did, by action."""

    def __init__(self, system: ChaosSystem, plan: ChaosPlan) -> None:
        self._system, self._plan = system, plan
        self._jobs = {planned.payment_id: planned.job for planned in plan.jobs if planned.job is not None}
        self._log = CallbackLog(system.service_log)
        self._due: list[tuple[float, int, Callable[[str], None], str]] = []
        """Heap of actions: time in Unix seconds, number, action, payment id."""
        self._scheduled = 0
        self._ends_to_send: list[str] = []
        self._seen: set[str] = set()
        self._finishing = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def finish(self) -> None:
        """Make all debits that are left at once, end no more holds, and stop the thread."""
        self._finishing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._finishing.is_set():
                self._schedule_new_debits()
                self._run_due_actions(time.time())
                self._send_ends_of_holds()
                self._finishing.wait(_INTERVAL_S)
            self._schedule_new_debits()
            # Credits that are not due yet could hide a debit that the bank cannot pay.
            self._due = [action for action in self._due if action[2] == self._debit]
            while self._due:
                self._run_due_actions(float("inf"))
        except Exception as error:  # noqa: BLE001 - reported at the end
            self.problems.append(f"debits stopped: {error!r}")

    def _schedule_new_debits(self) -> None:
        for line in self._log.new_lines():
            payment_id = line["args"][-1]
            if line["task"] == RELEASED_TASK and payment_id not in self._seen:
                self._seen.add(payment_id)
                self._schedule(line["at"] + self._plan.debits[payment_id].after_s, self._debit, payment_id)

    def _schedule(self, at: float, action: Callable[[str], None], payment_id: str) -> None:
        self._scheduled += 1
        heapq.heappush(self._due, (at, self._scheduled, action, payment_id))

    def _run_due_actions(self, until: float) -> None:
        while self._due and self._due[0][0] <= until:
            _, _, action, payment_id = heapq.heappop(self._due)
            try:
                action(payment_id)
            except httpx.TransportError:  # a fault: the provider's port is closed
                if action == self._debit:  # a credit is not repeated: the bank may have added it
                    self._schedule(time.time() + _RETRY_AFTER_S, action, payment_id)
                return

    def _debit(self, payment_id: str) -> None:
        job, planned = self._jobs[payment_id], self._plan.debits[payment_id]
        self._system.simulator.post(f"bank/{job['account_id']}/debit", payment_id=payment_id, amount=job["amount"])
        self.counts["debits"] += 1
        if self._finishing.is_set():
            return
        now = time.time()
        if planned.end_hold_after_s is not None:
            self._schedule(now + planned.end_hold_after_s, self._ends_to_send.append, payment_id)
        if planned.credit_after_s is not None:
            self._schedule(now + planned.credit_after_s, self._credit, payment_id)

    def _credit(self, payment_id: str) -> None:
        job = self._jobs[payment_id]
        self._system.simulator.post(f"bank/{job['account_id']}/credit", amount=job["amount"])
        self.counts["credits"] += 1

    def _send_ends_of_holds(self) -> None:
        if self._ends_to_send and self._system.end_holds(self._ends_to_send):
            self.counts["holds ended"] += len(self._ends_to_send)
            self._ends_to_send.clear()
