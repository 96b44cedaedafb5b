"""Admission control against a Python model: rate limiter, slots, circuit breaker and rate limits of the provider."""

from copy import copy
from datetime import datetime, timedelta
from typing import Any, ClassVar, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from redis import Redis

from tests.support.in_process import START
from worker.correlation.admission import (
    DELAYED_CALLS_FIRST,
    MAX_OPEN_DURATION,
    OPEN_DURATION,
    Admission,
    AdmissionControl,
    BreakerChange,
    CallStatus,
    Denied,
)

pytestmark = pytest.mark.slow

KEY = "payready:admission:test"
SECOND = timedelta(seconds=1)
PER_S, BURST, FAILURES = 8, 2, 2
INTERVAL, PROBE_LIMIT = SECOND / PER_S, timedelta(seconds=40)
BELIEVED = timedelta(seconds=61)
"""A stored time further in the future than this comes from a wrong clock and is ignored."""


class Model:
    """Python model of admission control."""

    def __init__(self) -> None:
        self.spent_until = self.delayed_until = self.probed_until = START - SECOND
        self.failures, self.pause = 0, OPEN_DURATION / 2
        self.open: tuple[datetime, datetime] | None = None
        """Since when and until when the breaker is open; kept until a response."""

    def admit(self, now: datetime, wanted: int, *, has_slot: bool) -> Admission:
        """Return the expected admission: breaker first, then rate limiter; a new call cannot overtake delayed calls."""
        open_until = self.open[1] if self.open and self.is_open(now) else None
        if open_until and now < open_until:
            return Admission(granted=0, denied=Denied(reason="circuit_open", until=open_until))
        if open_until and now < self.probed_until <= now + BELIEVED:
            return Admission(granted=0, denied=Denied(reason="half_open", until=now + SECOND))
        admitted, why = (1, Denied(reason="half_open", until=now + SECOND)) if open_until else (wanted, None)
        if not has_slot:
            if now < self.delayed_until <= now + BELIEVED:
                return Admission(granted=0, denied=Denied(reason="rate_limited", until=now))
            spent_until = self._spent(now)
            free = BURST - -(-(spent_until - now) // INTERVAL)
            if free < admitted:
                admitted, self.delayed_until = max(0, free), now + DELAYED_CALLS_FIRST
                why = Denied(reason="rate_limited", until=spent_until + (admitted - BURST + 1) * INTERVAL)
            self.spent_until = spent_until + admitted * INTERVAL
        if open_until and admitted:
            self.probed_until = now + PROBE_LIMIT
        return Admission(granted=admitted, denied=why if admitted < wanted else None)

    def reserve(self, now: datetime, wanted: int) -> list[timedelta]:
        """Return slots in the rest of the next second. While there are too few, new calls are delayed."""
        first = self._spent(now)
        count = min(wanted, max(0, (now + SECOND - first) // INTERVAL))
        self.spent_until = first + count * INTERVAL
        if count < wanted:
            self.delayed_until = now + DELAYED_CALLS_FIRST
        return [first - now + index * INTERVAL for index in range(count)]

    def is_open(self, now: datetime) -> bool:
        return self.open is not None and self.open[1] <= now + BELIEVED

    def _spent(self, now: datetime) -> datetime:
        return max(self.spent_until, now) if self.spent_until <= now + BELIEVED else now

    def refund(self, unused: int, admitted_at: datetime) -> None:
        """Undo the admission of unused calls. A probe is a call admitted since the breaker opened."""
        self.spent_until -= unused * INTERVAL
        if self.open is None or admitted_at > self.open[0]:
            self.probed_until = START - SECOND

    def record(
        self, status: CallStatus, claimed_at: datetime, now: datetime, retry_at: datetime | None
    ) -> BreakerChange:
        """Record a call result: a response closes the breaker, and consecutive failures or a failed probe open it."""
        if status != "failed":
            was_open = self.is_open(now)
            is_recent = not (self.open and was_open) or now >= self.open[0]
            if is_recent:
                self.failures, self.pause, self.open, self.probed_until = 0, OPEN_DURATION / 2, None, START - SECOND
            if status == "rate_limited":
                self.spent_until = max(self._spent(now), (retry_at or now) + (BURST - 1) * INTERVAL)
            return BreakerChange(kind="closed" if was_open and is_recent else "unchanged")
        self.failures += 1
        was_open = self.is_open(now)
        is_recent = claimed_at > self.open[0] if self.open and was_open else self.failures >= FAILURES
        if not is_recent:
            return BreakerChange(kind="unchanged")
        self.pause, self.probed_until = min(2 * self.pause, MAX_OPEN_DURATION), START - SECOND
        self.open = now, now + self.pause
        return BreakerChange(kind="opened", open_until=self.open[1])


milliseconds = st.sampled_from([0, 1, 60, 125, 250, 400, 999, 1000, 2000, 5000, 5001, 9000, 30_000])
skews = st.sampled_from([0, 0, 0, -40, 40])
counts = st.integers(1, 4)
which_one = st.sampled_from([0, 1, -1, -1])
"""Index of a call in flight. The newest call is the probe, if there is one."""
ahead = st.sampled_from([300, 3600])


class ModelComparisonMachine(RuleBasedStateMachine):
    """Replicas with slightly different clocks request admissions and record call results."""

    redis: ClassVar["Redis"]

    def __init__(self) -> None:
        super().__init__()
        self.model, self.now = Model(), START
        self.redis.flushall()
        self.admission = AdmissionControl(
            self.redis, "test", calls_per_s=PER_S, failure_threshold=FAILURES, probe_timeout=PROBE_LIMIT
        )
        self.admitted_calls: list[datetime] = []
        """Admission times of the calls without a result."""

    @rule(passed=milliseconds)
    def time_passes(self, passed: int) -> None:
        self.now += timedelta(milliseconds=passed)

    @rule(skew=skews, wanted=counts, has_slot=st.booleans())
    def request_admission(self, skew: int, wanted: int, *, has_slot: bool) -> None:
        """Request calls as one replica."""
        now = self.now + timedelta(milliseconds=skew)
        admission = self.admission.admit_calls_or_probe(now, wanted, has_slot=has_slot)
        assert admission == self.model.admit(now, wanted, has_slot=has_slot)
        self.admitted_calls += [now] * admission.granted

    @rule(which=which_one)
    def refund_calls(self, which: int) -> None:
        """Refund calls whose claims were rolled back or that no payment needs."""
        if self.admitted_calls:
            admitted_at = self.admitted_calls[which % len(self.admitted_calls)]
            count = self.admitted_calls.count(admitted_at)
            self.admitted_calls = [at for at in self.admitted_calls if at != admitted_at]
            self.admission.refund_slots_and_probe(count, admitted_at)
            self.model.refund(count, admitted_at)

    def record_result(
        self, status: CallStatus, which: int, retry_at: datetime | None = None, *, ago_ms: int = 0
    ) -> None:
        claimed_at = self.admitted_calls.pop(which % len(self.admitted_calls)) if self.admitted_calls else None
        ended_at = self.now - timedelta(milliseconds=ago_ms)
        change = self.admission.apply_result_to_breaker_and_limiter(status, claimed_at, ended_at, retry_at)
        assert change == self.model.record(status, claimed_at or ended_at, ended_at, retry_at)

    @invariant()
    def admission_matches_the_model(self) -> None:
        """The check restores the stored state."""
        open_until = self.model.open[1] if self.model.open and self.model.is_open(self.now) else None
        is_over = open_until is not None and open_until <= self.now
        assert self.admission.status(self.now).open_until == (None if is_over else open_until)
        known = cast(dict[Any, Any], self.redis.hgetall(KEY))
        for slots in ([True, True], [False, True]):
            model = copy(self.model)
            for has_slot in slots:
                assert self.admission.admit_calls_or_probe(self.now, 2, has_slot=has_slot) == model.admit(
                    self.now, 2, has_slot=has_slot
                )
            self.redis.delete(KEY)
            if known:
                self.redis.hset(KEY, mapping=known)


class RateLimiterMachine(ModelComparisonMachine):
    """Many call requests; the provider mostly responds."""

    @rule(wanted=st.integers(1, 12))
    def reserve_slots(self, wanted: int) -> None:
        """The sweep reserves slots for delayed calls."""
        assert self.admission.limiter.reserve_slots_of_next_second(self.now, wanted) == self.model.reserve(
            self.now, wanted
        )

    @rule(which=which_one, retry_s=st.none() | st.sampled_from([1, 7, 30]))
    def record_rate_limited(self, which: int, retry_s: int | None) -> None:
        self.record_result("rate_limited", which, None if retry_s is None else self.now + timedelta(seconds=retry_s))

    @rule(wanted=counts, ahead_s=ahead)
    def request_by_a_wrong_clock(self, wanted: int, ahead_s: int) -> None:
        """Other replicas ignore a time that is too far ahead."""
        now = self.now + timedelta(seconds=ahead_s)
        assert self.admission.admit_calls_or_probe(now, wanted, has_slot=False) == self.model.admit(
            now, wanted, has_slot=False
        )


class BreakerMachine(ModelComparisonMachine):
    """The provider fails, and earlier calls are still in flight."""

    @initialize()
    def begin(self) -> None:
        """Start with an open breaker that is about to admit a probe."""
        for before in (-30, -20, -10):
            self.request_admission(before, 2, has_slot=True)
        for _ in range(FAILURES):
            self.record_result("failed", 0)
        self.wait_until_half_open(timedelta(0))

    @rule(more=st.sampled_from([timedelta(0), timedelta(0), timedelta(microseconds=-1), PROBE_LIMIT]))
    def wait_until_half_open(self, more: timedelta) -> None:
        """Advance to the time of the probe, or to its timeout."""
        if self.model.open and self.model.is_open(self.now):
            self.now = max(self.now, self.model.open[1] + more)

    @rule(which=which_one)
    def record_failure(self, which: int) -> None:
        self.record_result("failed", which)

    @rule(passed=milliseconds)
    def fail_probe(self, passed: int) -> None:
        self.wait_until_half_open(timedelta(0))
        self.request_admission(0, 1, has_slot=True)
        self.time_passes(passed)
        self.record_failure(-1)

    @rule(status=st.sampled_from(["ok", "rate_limited"]), which=which_one, ago_ms=st.sampled_from([0, 0, 1, 250, 7500]))
    def record_response(self, status: CallStatus, which: int, ago_ms: int) -> None:
        """Record a response, possibly late."""
        self.record_result(status, which, ago_ms=ago_ms)

    @rule(wanted=st.integers(1, 4))
    def reserve_slots(self, wanted: int) -> None:
        assert self.admission.limiter.reserve_slots_of_next_second(self.now, wanted) == self.model.reserve(
            self.now, wanted
        )

    @rule(ahead_s=ahead)
    def record_failure_by_a_wrong_clock(self, ahead_s: int) -> None:
        now = self.now + timedelta(seconds=ahead_s)
        assert self.admission.apply_result_to_breaker_and_limiter("failed", now, now) == self.model.record(
            "failed", now, now, None
        )


@pytest.mark.parametrize("machine", [RateLimiterMachine, BreakerMachine])
def test_admission_control_matches_the_model(redis: "Redis", machine: type[ModelComparisonMachine]) -> None:
    """Operations run in any order, by clocks that differ slightly or are wrong."""
    machine.redis = redis
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=70, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
