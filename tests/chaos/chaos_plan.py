"""Plan of a chaos test: its messages and faults, drawn from a seed. The same seed gives the same plan.

A fault is due after a number of sent messages, not after a time. It therefore has the same position in the plan on a
slow machine.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

ROLES = {"web": 1, "worker": 2, "refresh": 2, "beat": 1}
"""Replicas of each role."""
REPLICAS = tuple(f"{role}{number}" for role, count in ROLES.items() for number in range(1, count + 1))

SCENARIOS = {
    "mix": 46,
    "prompt": 14,
    "slow": 10,
    "twice": 5,
    "early": 4,
    "lost": 4,
    "batch": 4,
    "throttled": 3,
    "poor": 2,
    "nullavail": 1,
    "late": 1,
    "never": 1,
    "unsent": 1,
    "silent": 1,
    "error": 1,
    "stale": 1,
    "inactive": 1,
}
"""Scenarios of the accounts, in percent. The simulator's other scenarios add no coverage."""

FAULT_KINDS = {
    "kill": 30,
    "restart": 10,
    "pause": 14,
    "valkey restarts": 8,
    "valkey killed": 6,
    "postgres crashes": 8,
    "redis emptied": 6,
    "provider refuses": 4,
    "webhooks paused": 5,
    "webhooks replayed": 5,
    "connections break": 3,
    "two beats": 2,
    "all killed": 2,
}
"""Faults, in percent. `kill` is SIGKILL, `restart` SIGTERM, `pause` SIGSTOP; these three target `REPLICAS`."""

RABBITMQ_FAULT_KINDS = FAULT_KINDS | {"rabbitmq killed": 8}
"""Faults of a run with RabbitMQ as the broker."""

SKEW_S = 1.0
"""Maximum deviation of a role's clock. Two clocks differ by at most the allowed 2 s."""


@dataclass(frozen=True)
class PlannedJob:
    """One message to `payments.initiate`, or to `payments.cancel` if `job` is None."""

    payment_id: str
    task_id: str
    job: dict[str, Any] | None


@dataclass(frozen=True)
class Fault:
    """Fault after `after` sent messages: on `target`, for `seconds`. The target's clock then deviates by `skew_s`."""

    after: int
    kind: str
    target: str
    seconds: float
    skew_s: float

    def __str__(self) -> str:
        return f"{self.kind} {self.target} {self.seconds:.1f} s".replace("  ", " ")


@dataclass(frozen=True)
class ChaosPlan:
    """All messages and faults of a run."""

    seed: int
    jobs: list[PlannedJob]
    faults: list[Fault]
    clocks: dict[str, float] = field(default_factory=dict)
    """Initial clock deviation by replica, in seconds."""

    def until(self, first: int, size: int) -> Iterator[PlannedJob]:
        """Yield the next messages."""
        yield from self.jobs[first : first + size]


def draw_plan(seed: int, payments: int, faults: int, kinds: Mapping[str, int] = FAULT_KINDS) -> ChaosPlan:
    """Draw a plan from the seed."""
    rng = Random(seed)
    planned_jobs = list(_draw_jobs(rng, payments))
    positions = sorted(rng.randrange(20, len(planned_jobs)) for _ in range(faults))
    clocks = {replica: _draw_skew(rng) for replica in REPLICAS}
    return ChaosPlan(seed, planned_jobs, [_draw_fault(rng, position, kinds) for position in positions], clocks)


def _draw_skew(rng: Random) -> float:
    return round(rng.uniform(-SKEW_S, SKEW_S), 2)


def _draw_jobs(rng: Random, payments: int) -> Iterator[PlannedJob]:
    accounts = [_draw_account(rng, number) for number in range(60)]
    for number in range(payments):
        if rng.random() < 0.5:  # replace an account that has had payments by a new one
            accounts[rng.randrange(len(accounts))] = _draw_account(rng, 60 + number)
        payment_id = f"pay_{number:06d}"
        planned_job = PlannedJob(payment_id, f"task-{number:06d}", _draw_job(rng, payment_id, rng.choice(accounts)))
        yield planned_job
        if rng.random() < 0.03:
            yield planned_job  # a duplicate of the same message
        if rng.random() < 0.03:
            yield PlannedJob(payment_id, f"task-{number:06d}-again", planned_job.job)
        if rng.random() < 0.03:
            yield PlannedJob(payment_id, f"cancel-{number:06d}", None)


def _draw_account(rng: Random, number: int) -> str:
    scenario = rng.choices(list(SCENARIOS), list(SCENARIOS.values()))[0]
    return f"acct_{scenario}{number:06d}"


def _draw_job(rng: Random, payment_id: str, account_id: str) -> dict[str, Any]:
    return {
        "payment_id": payment_id,
        "account_id": account_id,
        **({"profile_id": "p_storm"} if rng.random() < 0.5 else {}),
        "connection_id": f"conn_{account_id[-6:]}",
        "amount": rng.choice(["5.00", "20.00", "150.00", "300.00"]),
        "timeout_s": rng.choice([10, 20, 40, 40]),
        "max_balance_age_s": rng.choice([0, 5, 30, 30, 300]),
        "funds_check": rng.choice(["required", "required", "enabled"]),
    }


def _draw_fault(rng: Random, after: int, kinds: Mapping[str, int]) -> Fault:
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    target = rng.choice(REPLICAS) if kind in ("kill", "restart") else ""
    max_duration_s = {"kill": 2.0, "restart": 0.5, "pause": 9.0, "postgres crashes": 3.0, "two beats": 8.0}.get(
        kind, 2.0
    )
    if kind == "pause":
        target = rng.choice([*REPLICAS, "valkey", "postgres"])
        max_duration_s = 9.0 if target in REPLICAS else 4.0
    return Fault(after, kind, target, round(rng.uniform(0.1, max_duration_s), 2), _draw_skew(rng))
