"""`python -m tests.chaos`: inject faults while payments are processed, then check the invariants.

    --seed N        seed of the plan to repeat; by default a random seed, which is printed
    --payments N    number of payments; the run ends when they have ended
    --faults N      number of faults, spread over the payments
    --rabbitmq      use RabbitMQ from the system's package as the broker, with quorum queues; it is killed too
    --pooler        put PgBouncer from the system's package in front of PostgreSQL; it is killed too
    --sentinel      use Valkey with two replicas and three Sentinels; masters are killed and replaced
    --postgres-failover  use PostgreSQL with a synchronous standby; primaries are killed and standbys promoted
    --judge         only check the recorded observations in the folder again
    --folder PATH   folder for the logs and the observations

Exit status 0 if no invariant was violated.
"""

import argparse
import json
import secrets
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from demo.processes import StartOrExitError
from tests.chaos.bank_transfers import BankTransfers, CallbackLog
from tests.chaos.chaos_plan import SKEW_S, ChaosPlan, Fault, Topology, draw_plan
from tests.chaos.chaos_system import ChaosSystem, chaos_system
from tests.chaos.fault_injector import FaultInjector
from tests.chaos.invariants import Observed, read, violations
from tests.chaos.resending import Resender
from worker.ledger.payment_json import outcome_of_row

SEND_BATCH_SIZE = 20
"""Messages per batch."""
MAX_IN_FLIGHT = 300
"""Maximum number of unresolved payments."""
COMPLETION_TIMEOUT_S = 240.0
"""Maximum time for the last payments, calls and webhooks, including the simulator's retries."""
LIVENESS_INVARIANT = "no process ends except by a fault"


class ChaosTest:
    """One run of the chaos test."""

    def __init__(self, system: ChaosSystem, plan: ChaosPlan, topology: Topology) -> None:
        self.system, self.plan, self.topology = system, plan, topology
        self.resender = Resender(system)
        self._faults = FaultInjector(system)
        self.sent_at: dict[str, float] = {}
        self.callback_lines: list[dict[str, Any]] = []
        self.fault_counts: Counter[str] = Counter()
        self.problems: list[str] = []
        """Unexpected problems: faults that could not be injected, and waits that timed out."""
        self.unexpected_exits: list[str] = []
        """Processes that ended without a fault. Such an exit ends the run."""
        self._ended: set[str] = set()
        self._log = CallbackLog(system.service_log)
        self.transfers = BankTransfers(system, plan)
        self._threads: list[threading.Thread] = []

    def run(self) -> None:
        """Send all messages, inject all faults and wait until no work is left. Stop if a process ends by itself."""
        self.transfers.start()
        try:
            self._run_faults()
            self.system.check_all_running()
        except StartOrExitError as error:
            self.unexpected_exits.append(str(error))
            print(f"VIOLATION {error}\nthe run ends here", flush=True)
        finally:
            self.transfers.finish()

    def _run_faults(self) -> None:
        sent, faults = 0, list(self.plan.faults)
        max_in_flight = min(MAX_IN_FLIGHT, len(self.plan.jobs) // 4)
        while sent < len(self.plan.jobs) or faults:
            self.system.check_all_running()
            self._listen()
            while faults and faults[0].after <= sent:
                self._inject(faults.pop(0))
            if sent < len(self.plan.jobs) and len(self.sent_at) - len(self._ended) < max_in_flight:
                sent += self._send(sent)
            else:
                time.sleep(0.1)
        self.wait_for_faults()
        self._wait_for("every outcome is delivered", self._all_are_delivered)
        self._wait_for("every webhook is delivered", self._webhooks_are_through)
        self._wait_for("no work is left", self._nothing_is_due)
        self._listen()

    def wait_for_faults(self) -> None:
        """Wait until the last fault has ended."""
        for thread in self._threads:
            thread.join()

    def _send(self, first: int) -> int:
        batch = list(self.plan.until(first, SEND_BATCH_SIZE))
        now = time.time()
        if not self.system.send(batch):
            time.sleep(0.2)
            return 0  # the batch is sent again, so messages that arrived are duplicated
        for sending in batch:
            self.sent_at.setdefault(sending.payment_id, now)
        self.resender.track(batch, now)
        return len(batch)

    def _inject(self, fault: Fault) -> None:
        self.fault_counts[fault.kind] += 1
        thread = threading.Thread(target=self._apply_fault, args=(fault,))
        thread.start()
        self._threads.append(thread)

    def _apply_fault(self, fault: Fault) -> None:
        try:
            self._faults.inject(fault)
        except StartOrExitError as error:
            self.system.unexpected_exits.append(error)
        except Exception:  # noqa: BLE001 - reported at the end
            self.problems.append(f"{fault} could not be injected: {traceback.format_exc()}")

    def _listen(self) -> None:
        lines = self._log.new_lines()
        self.callback_lines += lines
        self._ended |= {line["args"][-1] for line in lines}
        self.resender.receive(lines)
        if self.topology.loses_messages:
            self.resender.send_overdue(time.time())

    def _wait_for(self, what: str, probe: Callable[[], Any]) -> None:
        deadline = time.monotonic() + COMPLETION_TIMEOUT_S
        while not probe():
            self.system.check_all_running()
            if time.monotonic() > deadline:
                self.problems.append(f"not within {COMPLETION_TIMEOUT_S:.0f} s: {what}")
                return
            time.sleep(0.2)

    def _all_are_delivered(self) -> bool:
        self._listen()
        return len(self._ended) == len(self.sent_at) and not self.resender.pending

    def _webhooks_are_through(self) -> bool:
        return bool(self.system.simulator.summary()["webhooks_pending"] == 0)

    def _nothing_is_due(self) -> bool:
        tables = ("payment", "outcome_delivery", "refresh", "balance")
        return all(
            self.system.rows(f"SELECT count(*) AS n FROM {table} WHERE due_at IS NOT NULL{more}")[0]["n"] == 0
            for table, more in zip(tables, (" AND state = 'waiting'", "", "", ""), strict=True)
        )

    def observed(self) -> Observed:
        """Read the observations from the payments service, the ledger and the provider."""
        tables = ("payment", "outcome_delivery", "refresh", "fee_entry", "balance")
        payments, deliveries, refreshes, entries, balances = (self.system.rows(f"SELECT * FROM {t}") for t in tables)
        entries.sort(key=lambda entry: entry["entry_id"])
        log = self.system.provider_log()
        return Observed(
            self.sent_at,
            self.callback_lines,
            [_with_whole_outcome(row) for row in payments],
            deliveries,
            refreshes,
            entries,
            balances,
            log["calls"],
            log["deliveries"],
            self.system.bank_debits(),
            dict(self.resender.tasks),
        )


def _with_whole_outcome(row: dict[str, Any]) -> dict[str, Any]:
    stored: Any = SimpleNamespace(**row)
    return {**row, "outcome": outcome_of_row(stored)}


def main() -> int:
    """Draw the plan, run it, check the invariants and print the report."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # raises, so that all processes are stopped
    options = _options()
    topology = Topology(**{field.name: getattr(options, field.name) for field in fields(Topology)})
    plan = draw_plan(options.seed, options.payments, options.faults, topology.fault_kinds)
    print(
        f"chaos test {plan.seed}: {options.payments} payments, {options.faults} faults, in {options.folder}", flush=True
    )
    if options.judge:
        found = violations(plan, read((options.folder / "observed.json").read_text()))
        print("\n".join(f"{len(details):4d} violations: {name} {details[:3] or ''}" for name, details in found.items()))
        return int(any(found.values()))
    start = time.monotonic()
    with chaos_system(options.folder, plan, topology) as system:
        chaos_test = ChaosTest(system, plan, topology)
        try:
            chaos_test.run()
        finally:
            chaos_test.wait_for_faults()
        observed = chaos_test.observed()
    (options.folder / "observed.json").write_text(json.dumps(asdict(observed), default=str))
    # After an unexpected exit the other invariants cannot be checked, because the run is incomplete.
    found = {
        LIVENESS_INVARIANT: chaos_test.unexpected_exits,
        **({} if chaos_test.unexpected_exits else violations(plan, observed)),
    }
    _report(chaos_test, observed, found, time.monotonic() - start)
    return int(bool(chaos_test.problems or chaos_test.transfers.problems or any(found.values())))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--payments", type=int, default=300)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--rabbitmq", action="store_true")
    parser.add_argument("--pooler", action="store_true")
    parser.add_argument("--sentinel", action="store_true")
    parser.add_argument("--postgres-failover", action="store_true")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    if options.pooler and options.postgres_failover:
        parser.error("choose --pooler or --postgres-failover: PgBouncer connects to one server")
    options.folder = options.folder or Path(tempfile.mkdtemp(prefix="payready-chaos-"))
    if not options.judge and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(
            f"{options.folder} is not empty; choose an empty folder, because files of an earlier run would be counted"
        )
    return options


def _report(chaos_test: ChaosTest, observed: Observed, found: dict[str, list[str]], seconds: float) -> None:
    outcomes = Counter(row["reason"] or row["state"] for row in observed.payments)
    accepted = sum(call["accepted"] for call in observed.calls)
    repeated = len(observed.delivered_results) - len({line["id"] for line in observed.delivered_results})
    passed = not chaos_test.problems and not chaos_test.transfers.problems and not any(found.values())
    print(f"\nseed {chaos_test.plan.seed}, {seconds:.0f} s, clocks differ by up to {2 * SKEW_S:.0f} s")
    print(
        f"payments {len(chaos_test.sent_at)}: " + ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
    )
    print(
        f"calls {len(observed.calls)}, of which {accepted} accepted; deliveries of webhooks {len(observed.deliveries)}"
    )
    print(f"callbacks {len(observed.delivered_results)}, of which {repeated} repeated under the same id")
    unpaid = sum(not debit["paid"] for debit in observed.debits)
    print(
        f"debits {len(observed.debits)}, of which the bank could not pay {unpaid}; "
        + ", ".join(f"{n} {action}" for action, n in chaos_test.transfers.counts.items() if action != "debits")
    )
    print(
        f"faults {chaos_test.fault_counts.total()}: "
        + ", ".join(f"{n} {kind}" for kind, n in chaos_test.fault_counts.most_common())
    )
    if chaos_test.topology.loses_messages:
        again = ", ".join(f"{n} {kind}" for kind, n in chaos_test.resender.counts.most_common())
        print(f"jobs sent again {chaos_test.resender.counts.total()}: {again}")
    for name, details in found.items():
        print(f"{len(details):4d} violations: {name}")
        for line in details[:10]:
            print(f"       {line}")
    for line in [*chaos_test.problems, *chaos_test.transfers.problems]:
        print(f"PROBLEM {line}")
    print("passed" if passed else f"FAILED; repeat with: python -m tests.chaos {_repeat_command(chaos_test)}")


def _repeat_command(chaos_test: ChaosTest) -> str:
    """Return the options that repeat the whole run."""
    payments = len({sending.payment_id for sending in chaos_test.plan.jobs})
    servers = " ".join((*chaos_test.topology.options, ""))
    return f"{servers}--seed {chaos_test.plan.seed} --payments {payments} --faults {len(chaos_test.plan.faults)}"


if __name__ == "__main__":
    sys.exit(main())
