"""Admission control for provider calls: a rate limiter (GCRA) and a circuit breaker, shared by all replicas in Redis.

The rate limiter keeps calls below the provider's limit. The circuit breaker stops calls while the provider fails.
Delayed calls get slots by earliest deadline first (EDF): the ledger knows the deadlines, and `payments.sweep` schedules
the calls. All state in Redis may be lost: the provider rejects excess calls with 429, and failing calls open the
circuit breaker again.

The state belongs to an API key: the provider counts the requests of a key, and fails for all that use it. So several
deployments with one key and one Redis share it, whatever their instances.
"""

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, cast

from redis import Redis

from worker.correlation.redis_client import EPOCH, LuaScript, duration_us, epoch_us, from_epoch_us

DELAYED_CALLS_FIRST = timedelta(seconds=2)
"""After a call was delayed, only delayed calls get slots for this long: until the next sweep but one."""
OPEN_DURATION, MAX_OPEN_DURATION = timedelta(seconds=5), timedelta(seconds=60)
"""How long the circuit breaker stays open the first time, and at most."""
MAX_CLOCK_ERROR = timedelta(seconds=1)
"""A stored time further ahead than `MAX_OPEN_DURATION` plus this was written by a wrong clock. The scripts ignore it,
too: their constant 61000000 is this sum in microseconds, as a test checks."""

ANNOUNCEMENT_TTL = timedelta(minutes=1)
"""How long the announcement of an API key is valid. `payments.sweep` repeats it each second."""

CallStatus = Literal["ok", "failed", "rate_limited"]
BreakerState = Literal["closed", "open", "half_open"]


def api_key_digest(api_key: str) -> str:
    """Return a short digest of an API key, for the names of keys in Redis."""
    return hashlib.blake2b(api_key.encode(), digest_size=6, person=b"payready limits").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Denied:
    """Why calls were not admitted, and when to try again.

    `rate_limited`: the rate limiter has no slot. `circuit_open`: the circuit breaker is open. `half_open`: a probe is
    being made.
    """

    reason: Literal["rate_limited", "circuit_open", "half_open"]
    until: datetime


@dataclass(frozen=True, kw_only=True)
class Admission:
    """How many calls were admitted, and why not all of them."""

    granted: int
    denied: Denied | None
    """None if all calls were admitted."""


@dataclass(frozen=True, kw_only=True)
class BreakerChange:
    """What a recorded call result did to the circuit breaker."""

    kind: Literal["opened", "closed", "unchanged"]
    open_until: datetime | None = None
    """Set if the result opened the circuit breaker."""


@dataclass(frozen=True, kw_only=True)
class AdmissionStatus:
    """State of admission control, for people and metrics."""

    breaker: BreakerState
    open_until: datetime | None
    """None if the circuit breaker is closed or half-open."""
    burst_used_ratio: float
    """Used share of the rate limiter's burst, from 0 to 1."""


class RateLimiter:
    """A GCRA rate limiter over all replicas. Its operations raise `REDIS_UNAVAILABLE`."""

    def __init__(self, redis: Redis, key: str, *, requests_per_s: int) -> None:
        self.key = key
        self.requests_per_s = requests_per_s
        # A quarter of a second's calls: with 20 calls/s no second sees more than Quiltt's limit of 25.
        self.burst_size = max(1, requests_per_s // 4)
        self._reserve_slots = LuaScript(redis, "reserve_slots")
        self._exhaust = LuaScript(redis, "exhaust")

    @property
    def interval(self) -> timedelta:
        """Time between two requests at the full rate."""
        return timedelta(seconds=1) / self.requests_per_s

    @property
    def burst_duration(self) -> timedelta:
        """Time in which an unused burst comes back."""
        return self.burst_size * self.interval

    def reserve_slots_of_next_second(self, now: datetime, max_count: int) -> list[timedelta]:
        """Reserve up to `max_count` slots in the next second; return their delays. If fewer, new calls wait 2 s."""
        if not self.requests_per_s:
            return []
        sizes = [max_count, duration_us(self.interval), duration_us(DELAYED_CALLS_FIRST)]
        granted, first = self._reserve_slots([self.key], [epoch_us(now), *sizes])
        return [from_epoch_us(first) - now + slot * self.interval for slot in range(int(granted))]

    def exhaust_slots_until(self, ended_at: datetime, retry_at: datetime) -> None:
        """Use up all slots until `retry_at`: the provider returned 429 to a request that ended at `ended_at`."""
        tat = retry_at + (self.burst_size - 1) * self.interval
        self._exhaust([self.key], [epoch_us(ended_at), epoch_us(tat)])


class CircuitBreaker:
    """Stops calls after `failure_threshold` consecutive failures. Its operations raise `REDIS_UNAVAILABLE`.

    Open for `OPEN_DURATION`, then half-open: one probe is admitted. Each failed probe doubles the time up to
    `MAX_OPEN_DURATION`. A probe without a result after `probe_timeout` is replaced by another one.

    A success changes nothing while the breaker is closed and has counted no failure. It is recorded only if this
    process has counted a failure, or if its last admission found one.
    """

    def __init__(self, redis: Redis, key: str, *, failure_threshold: int, probe_timeout: timedelta) -> None:
        self.key = key
        self.failure_threshold = failure_threshold
        self.probe_timeout = probe_timeout
        self._record_result = LuaScript(redis, "record_result")
        self._failure_numbers = itertools.count(1)
        self.last_failure = 0
        """Number of the last failure that this process has counted."""
        self._seen_without_failures_after: int | None = None

    def note_admission(self, *, has_failures: bool, last_failure_before: int) -> None:
        """Note whether an admission found failures. `last_failure_before`: `last_failure` when it was requested."""
        self._seen_without_failures_after = None if has_failures else last_failure_before

    def record_result(self, status: Literal["ok", "failed"], claimed_at: datetime, ended_at: datetime) -> BreakerChange:
        """Record a call's result. A call from before the last opening neither opens nor closes the breaker."""
        if status == "failed":
            self.last_failure = next(self._failure_numbers)
        elif self._seen_without_failures_after == self.last_failure:
            return BreakerChange(kind="unchanged")
        durations = [duration_us(OPEN_DURATION), duration_us(MAX_OPEN_DURATION)]
        args = [status, epoch_us(ended_at), self.failure_threshold, *durations, epoch_us(claimed_at)]
        kind, open_until = self._record_result([self.key], args)
        return BreakerChange(kind=kind, open_until=from_epoch_us(open_until) if kind == "opened" else None)


class AdmissionControl:
    """Decides how many provider calls may be made now with an API key. Each operation is one Lua script.

    Rate limiter and circuit breaker share one Redis hash, so that `admit` asks both in one atomic step. `admit.lua`
    documents the hash. All operations raise `REDIS_UNAVAILABLE`.
    """

    def __init__(
        self, redis: Redis, key_digest: str, *, calls_per_s: int, failure_threshold: int, probe_timeout: timedelta
    ) -> None:
        self.key_digest = key_digest
        key = _admission_key(key_digest)
        self.limiter = RateLimiter(redis, key, requests_per_s=calls_per_s)
        self.breaker = CircuitBreaker(redis, key, failure_threshold=failure_threshold, probe_timeout=probe_timeout)
        self._redis = redis
        self._admit = LuaScript(redis, "admit")
        self._refund = LuaScript(redis, "refund")

    def admit_calls_or_probe(self, now: datetime, max_count: int, *, has_slot: bool) -> Admission:
        """Admit up to `max_count` calls. `has_slot` skips the rate limiter; a shortage delays new calls for 2 s."""
        limiter, breaker = self.limiter, self.breaker
        rate: list[Any] = [duration_us(limiter.interval), limiter.burst_size, int(has_slot)]
        durations = [duration_us(breaker.probe_timeout), duration_us(DELAYED_CALLS_FIRST)]
        last_failure = breaker.last_failure
        granted, reason, until, has_failures = self._admit([limiter.key], [epoch_us(now), *rate, *durations, max_count])
        breaker.note_admission(has_failures=bool(has_failures), last_failure_before=last_failure)
        denied = None if int(granted) == max_count else Denied(reason=reason, until=from_epoch_us(until))
        return Admission(granted=int(granted), denied=denied)

    def reserve_slots_of_next_second(self, now: datetime, max_count: int) -> list[timedelta]:
        """Reserve up to `max_count` slots for delayed calls; return their delays. If fewer, new calls wait 2 s."""
        return self.limiter.reserve_slots_of_next_second(now, max_count)

    def refund_slots_and_probe(self, count: int, admitted_at: datetime) -> None:
        """Return the slots, and free the probe, of `count` calls that were admitted at this time and are not made."""
        self._refund([self.limiter.key], [duration_us(self.limiter.interval * count), epoch_us(admitted_at)])

    def apply_result_to_breaker_and_limiter(
        self, status: CallStatus, claimed_at: datetime | None, ended_at: datetime, retry_at: datetime | None = None
    ) -> BreakerChange:
        """Record how and when a call ended.

        A 429 (`rate_limited`) is a response, so it counts as success for the circuit breaker. `retry_at` is when the
        provider accepts calls again, by its own response.
        """
        if status == "rate_limited":
            self.limiter.exhaust_slots_until(ended_at, retry_at or ended_at)
        return self.breaker.record_result(
            "failed" if status == "failed" else "ok", claimed_at=claimed_at or ended_at, ended_at=ended_at
        )

    def status(self, now: datetime) -> AdmissionStatus:
        """Return the current state. Changes nothing."""
        return _read_status(self._redis, self.limiter.key, self.limiter.burst_duration, now)


class AnnouncedAdmission:
    """Admission control of the API keys that a deployment uses, for processes that do not have the key.

    A process with the key announces the key's digest in one hash of the deployment. All operations raise
    `REDIS_UNAVAILABLE`.

    {prefix}payready:admission_keys   hash, expires `ANNOUNCEMENT_TTL` after the last announcement:
      {digest of an API key}   when it was announced last (µs)
    """

    def __init__(self, redis: Redis, *, key_prefix: str, burst_duration: timedelta) -> None:
        self.key = f"{key_prefix}payready:admission_keys"
        self._redis = redis
        self._burst_duration = burst_duration

    def announce(self, key_digest: str, now: datetime) -> None:
        """Announce that the deployment uses this API key."""
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.hset(self.key, key_digest, epoch_us(now))
            pipeline.expire(self.key, ANNOUNCEMENT_TTL)
            pipeline.execute()

    def statuses(self, now: datetime) -> list[AdmissionStatus]:
        """Return the state of each announced API key, in the order of the digests. Changes nothing."""
        announced = cast(Mapping[str, str], self._redis.hgetall(self.key))
        digests = sorted(digest for digest, at in announced.items() if now - from_epoch_us(at) <= ANNOUNCEMENT_TTL)
        return [_read_status(self._redis, _admission_key(each), self._burst_duration, now) for each in digests]


def _admission_key(key_digest: str) -> str:
    return f"payready:admission:{key_digest}"


def _read_status(redis: Redis, key: str, burst_duration: timedelta, now: datetime) -> AdmissionStatus:
    stored = redis.hmget(key, "tat", "open_until")
    tat, open_until = (None if text is None else from_epoch_us(str(text)) for text in stored)
    breaker = _breaker_state(open_until, now)
    return AdmissionStatus(
        breaker=breaker,
        open_until=open_until if breaker == "open" else None,
        burst_used_ratio=_burst_used_ratio(tat, now, burst_duration),
    )


def _breaker_state(open_until: datetime | None, now: datetime) -> BreakerState:
    """Return the state that the stored time means. Times of a wrong clock, and 0, mean that it is closed."""
    if open_until is None or not EPOCH < open_until <= now + MAX_OPEN_DURATION + MAX_CLOCK_ERROR:
        return "closed"
    return "open" if now < open_until else "half_open"


def _burst_used_ratio(tat: datetime | None, now: datetime, burst_duration: timedelta) -> float:
    """Return the used share of the burst (0 to 1) at a theoretical arrival time."""
    ahead = max(timedelta(0), (tat or now) - now)
    return min(1.0, ahead / burst_duration)
