"""Plan of a chaos test: its messages and faults, drawn from a seed. The same seed gives the same plan.

A fault is due after a number of sent messages, not after a time. It therefore has the same position in the plan on a
slow machine.
"""

import math
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

LASTING_SCENARIOS = ("mix", "mix", "mix", "prompt", "slow", "twice", "early", "batch", "lost", "unsent", "late")
"""Scenarios of the accounts that have payments during the whole run. Each of them shows balances."""
LASTING_ACCOUNTS = 24
LASTING_RATIO = 0.5
"""Part of the payments that is made on lasting accounts."""
LASTING_MAX_BALANCE_AGES_S = (0, 0, 5, 5, 30)
"""Short, so that most payments on lasting accounts need a new balance: it may show a debit, or not yet."""
MAX_BALANCE_AGES_S = (0, 5, 30, 30, 300)

MAX_CALLBACK_DELAY_S = 120
"""Maximum time from the delivery of an outcome to the run of its callback, including outages."""
DEFAULT_HOLD_S = 90 + MAX_CALLBACK_DELAY_S
"""`PAYREADY_FUNDS_HOLD_S` of the chaos test: the longest time until a debit."""

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

TOPOLOGY_FAULT_KINDS = {
    "rabbitmq": {"rabbitmq killed": 8},
    "pooler": {"pooler killed": 8},
    "sentinel": {"redis failover": 20, "sentinel killed": 3},
    "postgres_failover": {"postgres failover": 20, "standby killed": 3},
}
"""Further faults by field of `Topology`."""

SKEW_S = 1.0
"""Maximum deviation of a role's clock. Two clocks differ by at most the allowed 2 s."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Servers of a run. The default is one PostgreSQL and one Valkey for broker, results and correlation store."""

    rabbitmq: bool = False
    """RabbitMQ is the broker."""
    pooler: bool = False
    """PgBouncer is in front of PostgreSQL."""
    sentinel: bool = False
    """Valkey has two replicas, and three Sentinels."""
    postgres_failover: bool = False
    """PostgreSQL has a synchronous standby."""

    @property
    def fault_kinds(self) -> dict[str, int]:
        """Kinds of faults with their weights."""
        further = [TOPOLOGY_FAULT_KINDS[name] for name, is_used in vars(self).items() if is_used]
        return {kind: weight for kinds in (FAULT_KINDS, *further) for kind, weight in kinds.items()}

    @property
    def loses_messages(self) -> bool:
        """Whether a failover may lose messages, because Redis replicates asynchronously."""
        return self.sentinel

    @property
    def options(self) -> list[str]:
        """Options of the command line that choose this topology."""
        return [f"--{name.replace('_', '-')}" for name, is_used in vars(self).items() if is_used]


@dataclass(frozen=True)
class PlannedJob:
    """One message to `payments.initiate`, or to `payments.cancel` if `job` is None."""

    payment_id: str
    task_id: str
    job: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class PlannedDebit:
    """What follows the callback of a payment, if it is released. All times are seconds."""

    after_s: float
    """From the callback to the debit."""
    end_hold_after_s: float | None
    """From the debit to the message `payments.end_hold`. None: the hold ends by its time."""
    credit_after_s: float | None
    """From the debit to a credit of the same amount, so that the account can pay again. None: no credit."""


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
    debits: dict[str, PlannedDebit] = field(default_factory=dict)
    """By payment id."""
    bank_accounts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of each account at the simulator's bank, by account id."""

    def until(self, first: int, size: int) -> Iterator[PlannedJob]:
        """Yield the next messages."""
        yield from self.jobs[first : first + size]


def draw_plan(seed: int, payments: int, faults: int, kinds: Mapping[str, int] = FAULT_KINDS) -> ChaosPlan:
    """Draw a plan from the seed."""
    rng = Random(seed)
    debits = {payment_id: _draw_debit(rng) for payment_id in map(_payment_id, range(payments))}
    planned_jobs = list(_draw_jobs(rng, debits))
    positions = sorted(rng.randrange(20, len(planned_jobs)) for _ in range(faults))
    clocks = {replica: _draw_skew(rng) for replica in REPLICAS}
    drawn_faults = [_draw_fault(rng, position, kinds) for position in positions]
    accounts = dict.fromkeys(planned.job["account_id"] for planned in planned_jobs if planned.job is not None)
    bank_accounts = {account_id: _draw_bank_account(rng, account_id) for account_id in accounts}
    return ChaosPlan(seed, planned_jobs, drawn_faults, clocks, debits, bank_accounts)


def _draw_skew(rng: Random) -> float:
    return round(rng.uniform(-SKEW_S, SKEW_S), 2)


def _payment_id(number: int) -> str:
    return f"pay_{number:06d}"


def _draw_jobs(rng: Random, debits: Mapping[str, PlannedDebit]) -> Iterator[PlannedJob]:
    accounts = [_draw_account(rng, number) for number in range(60)]
    lasting = [_account_id(rng.choice(LASTING_SCENARIOS), 900_000 + number) for number in range(LASTING_ACCOUNTS)]
    for number, (payment_id, debit) in enumerate(debits.items()):
        if rng.random() < 0.5:  # replace an account that has had payments by a new one
            accounts[rng.randrange(len(accounts))] = _draw_account(rng, 60 + number)
        is_lasting = rng.random() < LASTING_RATIO
        account_id = rng.choice(lasting if is_lasting else accounts)
        max_balance_age_s = rng.choice(LASTING_MAX_BALANCE_AGES_S if is_lasting else MAX_BALANCE_AGES_S)
        job = _draw_job(rng, payment_id, account_id, debit) | {"max_balance_age_s": max_balance_age_s}
        planned_job = PlannedJob(payment_id, f"task-{number:06d}", job)
        yield planned_job
        if rng.random() < 0.03:
            yield planned_job  # a duplicate of the same message
        if rng.random() < 0.03:
            yield PlannedJob(payment_id, f"task-{number:06d}-again", planned_job.job)
        if rng.random() < 0.03:
            yield PlannedJob(payment_id, f"cancel-{number:06d}", None)


def _draw_account(rng: Random, number: int) -> str:
    return _account_id(rng.choices(list(SCENARIOS), list(SCENARIOS.values()))[0], number)


def _account_id(scenario: str, number: int) -> str:
    return f"acct_{scenario}{number:06d}"


def _draw_bank_account(rng: Random, account_id: str) -> dict[str, Any]:
    """Draw an opening balance that covers some of the payments, and how the bank's balance reaches payready."""
    balance = rng.choice(["12.00", "100.00", "260.00", "500.00", "900.00"])
    return {
        "balance": "1.00" if account_id.startswith("acct_poor") else balance,
        "balance_time": rng.choice(["read", "record"]),
        "max_late_s": rng.choice([0, 2, 15]),
    }


def _draw_debit(rng: Random) -> PlannedDebit:
    """Draw seconds to minutes from the callback to the debit. Most holds are ended once the debit shows."""
    shortest_s, longest_s = rng.choice([(0.5, 5.0), (0.5, 5.0), (5.0, 30.0), (5.0, 30.0), (30.0, 90.0)])
    return PlannedDebit(
        after_s=round(rng.uniform(shortest_s, longest_s), 2),
        end_hold_after_s=round(rng.choice([0.0, rng.uniform(0.0, 10.0)]), 2) if rng.random() < 0.7 else None,
        # Late enough that a payment which was released on money of another one meets an empty account.
        credit_after_s=round(rng.uniform(20.0, 90.0), 2) if rng.random() < 0.8 else None,
    )


def _draw_job(rng: Random, payment_id: str, account_id: str, debit: PlannedDebit) -> dict[str, Any]:
    return {
        "payment_id": payment_id,
        "account_id": account_id,
        **({"profile_id": "p_storm"} if rng.random() < 0.5 else {}),
        "connection_id": f"conn_{account_id[-6:]}",
        "amount": rng.choice(["5.00", "20.00", "150.00", "300.00"]),
        "timeout_s": rng.choice([10, 20, 40, 40]),
        "funds_check": rng.choice(["required", "required", "enabled"]),
        **({"hold_s": math.ceil(debit.after_s) + MAX_CALLBACK_DELAY_S} if rng.random() < 0.5 else {}),
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
