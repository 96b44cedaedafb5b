"""The gate to the provider: one for all replicas, in Redis.

It keeps calls within a budget of so many a second, and is shut while the provider only fails. What is held back is
let through by the nearest deadline first: the ledger knows those, and its sweep says whose turn it is. Losing what is
in here costs little: the provider answers 429 to what is too much, and the next failures shut the gate again.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from redis import Redis

from worker.correlation.client import Script, at_epoch, microseconds, since_epoch

CROWDED = timedelta(seconds=2)
"""So long after a call was held back, others wait for it too: until the sweep's turn, and the next."""
PAUSE, LONGEST_PAUSE = timedelta(seconds=5), timedelta(seconds=60)
"""How long the gate is shut the first time, and at most."""

End = Literal["answered", "failed", "throttled"]


@dataclass(frozen=True)
class HeldBack:
    """A call that may not go out.

    `full`: the budget is spent. `shut`: all calls fail. `probing`: one call is trying whether they still do.
    """

    why: Literal["full", "shut", "probing"]
    until: datetime


@dataclass(frozen=True)
class Position:
    """How the gate stands."""

    shut_until: datetime | None
    """None: calls go out, if only one that tries whether they still fail."""
    budget_used: float
    """How much of what may go out at once is spent, from 0 to 1."""


class Budget:
    """So many requests a second, over all replicas; who cannot go now is given a place. Raises `CORRELATION_AWAY`."""

    def __init__(self, redis: Redis, name: str, *, per_s: int) -> None:
        self._key = f"payready:{name}"
        self._per_s = per_s
        self._reserve = Script(redis, "reserve")

    def reserve(self, now: datetime, wanted: int) -> list[timedelta]:
        """Places in the budget of the next second, as many as there are: how long from now each is to go."""
        if not self._per_s:
            return []
        interval = timedelta(seconds=1) / self._per_s
        sizes = [wanted, microseconds(interval), microseconds(CROWDED)]
        count, first = self._reserve([self._key], [since_epoch(now), *sizes])
        return [at_epoch(first) - now + place * interval for place in range(int(count))]


class Gate(Budget):
    """Leave to make a paid call. Each operation is one Lua script, which documents the key."""

    def __init__(self, redis: Redis, *, calls_per_s: int, failures: int, probe_limit: timedelta) -> None:
        super().__init__(redis, "gate", per_s=calls_per_s)
        self._redis = redis
        self._admit = Script(redis, "admit")
        self._give_back = Script(redis, "give_back")
        self._report = Script(redis, "report")
        self._interval = timedelta(seconds=1) / calls_per_s
        self._burst = max(1, calls_per_s // 4)  # with the budget of 20/s no second sees more than Quiltt's limit of 25
        self._failures = failures
        self._probe_limit = probe_limit

    def admit(self, now: datetime, wanted: int, *, in_turn: bool) -> tuple[int, HeldBack | None]:
        """Let calls out: how many, and why not all that are wanted.

        Calls `in_turn` were held back before, and have their places in the budget.
        """
        budget = [microseconds(self._interval), self._burst]
        spans = [microseconds(self._probe_limit), microseconds(CROWDED)]
        let_out, why, until = self._admit([self._key], [since_epoch(now), *budget, int(in_turn), *spans, wanted])
        return int(let_out), None if int(let_out) == wanted else HeldBack(why, at_epoch(until))

    def position(self, now: datetime) -> Position:
        """How it stands, to be told to people; nothing is changed. Raises `CORRELATION_AWAY`."""
        told = self._redis.hmget(self._key, "tat", "shut")
        tat, shut = (None if text is None else at_epoch(str(text)) for text in told)
        spent = max(timedelta(0), (tat or now) - now) / (self._burst * self._interval)
        # As admit.lua has it: nothing is further ahead but by a clock that was wrong.
        is_shut = shut is not None and now < shut <= now + LONGEST_PAUSE + timedelta(seconds=1)
        return Position(shut if is_shut else None, min(1.0, spent))

    def give_back(self, unused: int, let_out_at: datetime) -> None:
        """So many calls that were let out then are not made."""
        self._give_back([self._key], [microseconds(self._interval * unused), since_epoch(let_out_at)])

    def report(
        self, end: End, claimed_at: datetime | None, ended_at: datetime, retry_at: datetime | None = None
    ) -> datetime | None:
        """Say how and when a call ended that was claimed then; returns until when the gate is shut if this shut it.

        `retry_at` is when the provider will listen again, by its own word, after a throttled call.
        """
        pauses = [microseconds(PAUSE), microseconds(LONGEST_PAUSE)]
        spent_until = (retry_at or ended_at) + (self._burst - 1) * self._interval
        times = [since_epoch(spent_until), since_epoch(claimed_at or ended_at)]
        shut = self._report([self._key], [end, since_epoch(ended_at), self._failures, *pauses, *times])
        return at_epoch(shut) if shut != "0" else None
