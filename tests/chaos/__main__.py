"""`python -m tests.chaos`: break everything, again and again, while payments are under way; then see what held.

    --seed N        the storm to repeat; without it a new one is drawn, and its seed is printed
    --payments N    how many; the storm lasts as long as they take
    --faults N      how many, spread over the payments
    --rabbitmq      with RabbitMQ as the broker, on quorum queues, from the system's package; it is killed too
    --judge         only judge again what the storm in the folder has seen
    --folder PATH   where the logs go, and all that was seen

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
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from demo.processes import StartError
from tests.chaos.chaos_plan import FAULT_KINDS, RABBITMQ_FAULT_KINDS, SKEW_S, ChaosPlan, Fault, draw_plan
from tests.chaos.chaos_system import ChaosSystem, chaos_system
from tests.chaos.invariants import Observed, read, violations
from tests.support.rabbit import rabbitmq

BATCH = 20
"""Messages that are sent at a time."""
SEND_BATCH_SIZE = 300
"""Payments under way at most."""
CALM_TIMEOUT_S = 240.0
"""How long the last payments, calls and webhooks may take, the simulator's retries with them."""
LIVENESS_INTERVAL_S = "no process ends but by the storm"


class ChaosTest:
    """One storm while it lasts."""

    def __init__(self, made: ChaosSystem, plan: ChaosPlan) -> None:
        self.rig, self.plan = made, plan
        self.sent_at: dict[str, float] = {}
        self.told: list[dict[str, Any]] = []
        self.strikes: Counter[str] = Counter()
        self.trouble: list[str] = []
        """What a storm does not expect: a fault that could not be made, an end that was waited for in vain."""
        self.fallen: list[str] = []
        """Processes that ended though the storm did not end them. It is over then."""
        self._ended: set[str] = set()
        self._read = 0
        self._threads: list[threading.Thread] = []

    def run(self) -> None:
        """Send everything, strike with everything, and wait until all is over, or a process ends by itself."""
        try:
            self._run_faults()
            self.rig.check_all_running()
        except StartError as error:
            self.fallen.append(str(error))
            print(f"VIOLATION {error}\nthe storm ends here", flush=True)

    def _run_faults(self) -> None:
        sent, faults = 0, list(self.plan.faults)
        at_a_time = min(SEND_BATCH_SIZE, len(self.plan.jobs) // 4)
        while sent < len(self.plan.jobs) or faults:
            self.rig.check_all_running()
            self._listen()
            while faults and faults[0].after <= sent:
                self._inject(faults.pop(0))
            if sent < len(self.plan.jobs) and len(self.sent_at) - len(self._ended) < at_a_time:
                sent += self._send(sent)
            else:
                time.sleep(0.1)
        self.wait_for_calm()
        self._wait_for("every payment is told", self._all_are_delivered)
        self._wait_for("every webhook is delivered", self._webhooks_are_through)
        self._wait_for("nothing is left to be done", self._nothing_is_due)
        self._listen()

    def wait_for_calm(self) -> None:
        """Wait until the last fault is over."""
        for thread in self._threads:
            thread.join()

    def _send(self, first: int) -> int:
        batch = list(self.plan.until(first, BATCH))
        now = time.time()
        if not self.rig.send(batch):
            time.sleep(0.2)
            return 0  # they are sent again, and what arrived of them is there twice
        for sending in batch:
            self.sent_at.setdefault(sending.payment_id, now)
        return len(batch)

    def _inject(self, fault: Fault) -> None:
        self.strikes[fault.kind] += 1
        thread = threading.Thread(target=self._apply_fault, args=(fault,))
        thread.start()
        self._threads.append(thread)

    def _apply_fault(self, fault: Fault) -> None:
        try:
            self.rig.inject(fault)
        except StartError as error:
            self.rig.fallen.append(error)
        except Exception:  # noqa: BLE001 - to be told at the end
            self.trouble.append(f"{fault} could not be made: {traceback.format_exc()}")

    def _listen(self) -> None:
        if not self.rig.service_log.exists():
            return
        with self.rig.service_log.open() as log:
            log.seek(self._read)
            text = log.read()
        whole = text[: text.rfind("\n") + 1]
        self._read += len(whole.encode())
        lines = [json.loads(line) for line in whole.splitlines()]
        self.told += lines
        self._ended |= {line["args"][-1] for line in lines}

    def _wait_for(self, what: str, probe: Callable[[], Any]) -> None:
        end = time.monotonic() + CALM_TIMEOUT_S
        while not probe():
            self.rig.check_all_running()
            if time.monotonic() > end:
                self.trouble.append(f"not within {CALM_TIMEOUT_S:.0f} s: {what}")
                return
            time.sleep(0.2)

    def _all_are_delivered(self) -> bool:
        self._listen()
        return len(self._ended) == len(self.sent_at)

    def _webhooks_are_through(self) -> bool:
        return bool(self.rig.simulator.summary()["webhooks_pending"] == 0)

    def _nothing_is_due(self) -> bool:
        tables = ("payment", "outcome_delivery", "refresh", "balance")
        return all(
            self.rig.rows(f"SELECT count(*) AS n FROM {table} WHERE due_at IS NOT NULL{more}")[0]["n"] == 0
            for table, more in zip(tables, (" AND state = 'waiting'", "", "", ""), strict=True)
        )

    def observed(self) -> Observed:
        """What the witnesses say now."""
        tables = ("payment", "outcome_delivery", "refresh", "fee_entry", "balance")
        payments, replies, refreshes, entries, balances = (self.rig.rows(f"SELECT * FROM {t}") for t in tables)
        entries.sort(key=lambda entry: entry["entry_id"])
        log = self.rig.provider_log()
        return Observed(
            self.sent_at, self.told, payments, replies, refreshes, entries, balances, log["calls"], log["deliveries"]
        )


def main() -> int:
    """Draw, rage, judge, report."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # processes are not to outlive us
    options = _options()
    kinds = RABBITMQ_FAULT_KINDS if options.rabbitmq else FAULT_KINDS
    plan = draw_plan(options.seed, options.payments, options.faults, kinds)
    print(f"storm {plan.seed}: {options.payments} payments, {options.faults} faults, in {options.folder}", flush=True)
    if options.judge:
        found = violations(plan, read((options.folder / "seen.json").read_text()))
        print("\n".join(f"{len(where):4d} violations: {name} {where[:3] or ''}" for name, where in found.items()))
        return int(any(found.values()))
    start = time.monotonic()
    with ExitStack() as stack:
        broker = stack.enter_context(rabbitmq(options.folder / "rabbitmq")) if options.rabbitmq else None
        made = stack.enter_context(chaos_system(options.folder, plan, broker))
        storm = ChaosTest(made, plan)
        try:
            storm.run()
        finally:
            storm.wait_for_calm()
        seen = storm.observed()
    (options.folder / "seen.json").write_text(json.dumps(asdict(seen), default=str))
    # Of a storm that was cut short nobody knows what would have come of the rest.
    found = {LIVENESS_INTERVAL_S: storm.fallen, **({} if storm.fallen else violations(plan, seen))}
    _report(storm, seen, found, time.monotonic() - start)
    return int(bool(storm.trouble or any(found.values())))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--payments", type=int, default=300)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--rabbitmq", action="store_true")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    options.folder = options.folder or Path(tempfile.mkdtemp(prefix="payready-storm-"))
    if not options.judge and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty: what an earlier storm left there would be taken for this one's")
    return options


def _report(storm: ChaosTest, seen: Observed, found: dict[str, list[str]], seconds: float) -> None:
    ends = Counter(row["reason"] or row["state"] for row in seen.payments)
    accepted = sum(call["accepted"] for call in seen.calls)
    again = len(seen.delivered_results) - len({line["id"] for line in seen.delivered_results})
    held = not storm.trouble and not any(found.values())
    print(f"\nseed {storm.plan.seed}, {seconds:.0f} s, clocks apart by up to {2 * SKEW_S:.0f} s")
    print(f"payments {len(storm.sent_at)}: " + ", ".join(f"{n} {end}" for end, n in ends.most_common()))
    print(f"calls {len(seen.calls)}, of which {accepted} accepted; deliveries of webhooks {len(seen.deliveries)}")
    print(f"callbacks {len(seen.delivered_results)}, of which {again} again, under the same id")
    print(f"faults {storm.strikes.total()}: " + ", ".join(f"{n} {kind}" for kind, n in storm.strikes.most_common()))
    for name, where in found.items():
        print(f"{len(where):4d} violations: {name}")
        for line in where[:10]:
            print(f"       {line}")
    for line in storm.trouble:
        print(f"TROUBLE {line}")
    print("held" if held else f"FAILED; again: python -m tests.chaos {_repeat_command(storm)}")


def _repeat_command(storm: ChaosTest) -> str:
    """The options of the same storm, however much of it there was."""
    payments = len({sending.payment_id for sending in storm.plan.jobs})
    broker = "--rabbitmq " if storm.rig.is_on_rabbitmq else ""
    return f"{broker}--seed {storm.plan.seed} --payments {payments} --faults {len(storm.plan.faults)}"


if __name__ == "__main__":
    sys.exit(main())
