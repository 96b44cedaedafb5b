"""The gate against a few lines of Python: budget, turns, breaker and rate limit, whatever the replicas tell it."""

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

KEY = "payready:admission"
SECOND = timedelta(seconds=1)
PER_S, BURST, FAILURES = 8, 2, 2
INTERVAL, PROBE_LIMIT = SECOND / PER_S, timedelta(seconds=40)
BELIEVED = timedelta(seconds=61)
"""What is said to end later than so from now was said by a clock that is wrong."""


class Model:
    """What the gate promises."""

    def __init__(self) -> None:
        self.spent_until = self.crowded_until = self.probed_until = START - SECOND
        self.failures, self.pause = 0, OPEN_DURATION / 2
        self.shut: tuple[datetime, datetime] | None = None
        """Since when, and until when; it stays until a call was answered."""

    def admit(self, now: datetime, wanted: int, *, in_turn: bool) -> Admission:
        """While all fails none, then one; within the budget, unless it has a place there; nobody jumps the queue."""
        shut_until = self.shut[1] if self.shut and self.is_shut_believed(now) else None
        if shut_until and now < shut_until:
            return Admission(granted=0, denied=Denied(reason="circuit_open", until=shut_until))
        if shut_until and now < self.probed_until <= now + BELIEVED:
            return Admission(granted=0, denied=Denied(reason="half_open", until=now + SECOND))
        let_out, why = (1, Denied(reason="half_open", until=now + SECOND)) if shut_until else (wanted, None)
        if not in_turn:
            if now < self.crowded_until <= now + BELIEVED:
                return Admission(granted=0, denied=Denied(reason="rate_limited", until=now))
            spent_until = self._spent(now)
            free = BURST - -(-(spent_until - now) // INTERVAL)
            if free < let_out:
                let_out, self.crowded_until = max(0, free), now + DELAYED_CALLS_FIRST
                why = Denied(reason="rate_limited", until=spent_until + (let_out - BURST + 1) * INTERVAL)
            self.spent_until = spent_until + let_out * INTERVAL
        if shut_until and let_out:
            self.probed_until = now + PROBE_LIMIT
        return Admission(granted=let_out, denied=why if let_out < wanted else None)

    def reserve(self, now: datetime, wanted: int) -> list[timedelta]:
        """Places in what is left of the next second; while there are too few, whoever comes goes behind."""
        first = self._spent(now)
        places = min(wanted, max(0, (now + SECOND - first) // INTERVAL))
        self.spent_until = first + places * INTERVAL
        if places < wanted:
            self.crowded_until = now + DELAYED_CALLS_FIRST
        return [first - now + place * INTERVAL for place in range(places)]

    def is_shut_believed(self, now: datetime) -> bool:
        return self.shut is not None and self.shut[1] <= now + BELIEVED

    def _spent(self, now: datetime) -> datetime:
        return max(self.spent_until, now) if self.spent_until <= now + BELIEVED else now

    def give_back(self, unused: int, let_out_at: datetime) -> None:
        """As if they had not been let out; a probe is one that was let out since the gate was shut."""
        self.spent_until -= unused * INTERVAL
        if self.shut is None or let_out_at > self.shut[0]:
            self.probed_until = START - SECOND

    def report(self, end: CallStatus, claimed_at: datetime, now: datetime, retry_at: datetime | None) -> BreakerChange:
        """Any answer opens what was shut before, of so many failures in a row the last shuts it; and so do probes."""
        if end != "failed":
            is_shut = self.is_shut_believed(now)
            is_news = not (self.shut and is_shut) or now >= self.shut[0]
            if is_news:
                self.failures, self.pause, self.shut, self.probed_until = 0, OPEN_DURATION / 2, None, START - SECOND
            if end == "rate_limited":
                self.spent_until = max(self._spent(now), (retry_at or now) + (BURST - 1) * INTERVAL)
            return BreakerChange(kind="closed" if is_shut and is_news else "unchanged")
        self.failures += 1
        is_shut = self.is_shut_believed(now)
        is_news = claimed_at > self.shut[0] if self.shut and is_shut else self.failures >= FAILURES
        if not is_news:
            return BreakerChange(kind="unchanged")
        self.pause, self.probed_until = min(2 * self.pause, MAX_OPEN_DURATION), START - SECOND
        self.shut = now, now + self.pause
        return BreakerChange(kind="opened", open_until=self.shut[1])


milliseconds = st.sampled_from([0, 1, 60, 125, 250, 400, 999, 1000, 2000, 5000, 5001, 9000, 30_000])
skews = st.sampled_from([0, 0, 0, -40, 40])
counts = st.integers(1, 4)
which_one = st.sampled_from([0, 1, -1, -1])
"""Of the calls that are out, the newest is the probe, if there is one."""
ahead = st.sampled_from([300, 3600])


class AgainstAModel(RuleBasedStateMachine):
    """Replicas whose clocks are not quite the same ask the gate, and tell it how their calls ended."""

    redis: ClassVar["Redis"]

    def __init__(self) -> None:
        super().__init__()
        self.model, self.now = Model(), START
        self.redis.flushall()
        self.gate = AdmissionControl(
            self.redis, calls_per_s=PER_S, failure_threshold=FAILURES, probe_timeout=PROBE_LIMIT
        )
        self.out: list[datetime] = []
        """When each call was let out that has not ended."""

    @rule(passed=milliseconds)
    def time_passes(self, passed: int) -> None:
        self.now += timedelta(milliseconds=passed)

    @rule(skew=skews, wanted=counts, in_turn=st.booleans())
    def ask(self, skew: int, wanted: int, *, in_turn: bool) -> None:
        """A replica wants to call."""
        now = self.now + timedelta(milliseconds=skew)
        admission = self.gate.admit(now, wanted, has_slot=in_turn)
        assert admission == self.model.admit(now, wanted, in_turn=in_turn)
        self.out += [now] * admission.granted

    @rule(which=which_one)
    def calls_are_not_made(self, which: int) -> None:
        """Their claims were rolled back, or nobody waits for them any more."""
        if self.out:
            let_out_at = self.out[which % len(self.out)]
            together = self.out.count(let_out_at)
            self.out = [at for at in self.out if at != let_out_at]
            self.gate.refund(together, let_out_at)
            self.model.give_back(together, let_out_at)

    def end(self, end: CallStatus, which: int, retry_at: datetime | None = None, *, ago_ms: int = 0) -> None:
        claimed_at = self.out.pop(which % len(self.out)) if self.out else None
        ended_at = self.now - timedelta(milliseconds=ago_ms)
        told = self.gate.record_result(end, claimed_at, ended_at, retry_at)
        assert told == self.model.report(end, claimed_at or ended_at, ended_at, retry_at)

    @invariant()
    def whoever_asks_now_is_told_what_the_model_says(self) -> None:
        """Only asked for: what the gate knows is put back."""
        shut_until = self.model.shut[1] if self.model.shut and self.model.is_shut_believed(self.now) else None
        is_over = shut_until is not None and shut_until <= self.now
        assert self.gate.status(self.now).open_until == (None if is_over else shut_until)
        known = cast(dict[Any, Any], self.redis.hgetall(KEY))
        for asked in ([True, True], [False, True]):
            model = copy(self.model)
            for in_turn in asked:
                assert self.gate.admit(self.now, 2, has_slot=in_turn) == model.admit(self.now, 2, in_turn=in_turn)
            self.redis.delete(KEY)
            if known:
                self.redis.hset(KEY, mapping=known)


class Budget(AgainstAModel):
    """Many want to call, and the provider listens, more or less."""

    @rule(wanted=st.integers(1, 12))
    def give_turns(self, wanted: int) -> None:
        """The sweep wants places for calls that were held back."""
        assert self.gate.limiter.reserve_slots(self.now, wanted) == self.model.reserve(self.now, wanted)

    @rule(which=which_one, retry_s=st.none() | st.sampled_from([1, 7, 30]))
    def a_call_is_throttled(self, which: int, retry_s: int | None) -> None:
        self.end("rate_limited", which, None if retry_s is None else self.now + timedelta(seconds=retry_s))

    @rule(wanted=counts, ahead_s=ahead)
    def ask_by_a_wrong_clock(self, wanted: int, ahead_s: int) -> None:
        """What it says of its time is not believed by the others."""
        now = self.now + timedelta(seconds=ahead_s)
        assert self.gate.admit(now, wanted, has_slot=False) == self.model.admit(now, wanted, in_turn=False)


class Breaker(AgainstAModel):
    """The provider fails, and calls from before hang on the wire."""

    @initialize()
    def begin(self) -> None:
        """Shut, and about to be tried."""
        for before in (-30, -20, -10):
            self.ask(before, 2, in_turn=True)
        for _ in range(FAILURES):
            self.end("failed", 0)
        self.as_long_passes_as_it_is_shut(timedelta(0))

    @rule(more=st.sampled_from([timedelta(0), timedelta(0), timedelta(microseconds=-1), PROBE_LIMIT]))
    def as_long_passes_as_it_is_shut(self, more: timedelta) -> None:
        """To the moment when one call may try, or to when that one is given up."""
        if self.model.shut and self.model.is_shut_believed(self.now):
            self.now = max(self.now, self.model.shut[1] + more)

    @rule(which=which_one)
    def a_call_fails(self, which: int) -> None:
        self.end("failed", which)

    @rule(passed=milliseconds)
    def one_tries_and_fails(self, passed: int) -> None:
        self.as_long_passes_as_it_is_shut(timedelta(0))
        self.ask(0, 1, in_turn=True)
        self.time_passes(passed)
        self.a_call_fails(-1)

    @rule(end=st.sampled_from(["ok", "rate_limited"]), which=which_one, ago_ms=st.sampled_from([0, 0, 1, 250, 7500]))
    def a_call_is_answered(self, end: CallStatus, which: int, ago_ms: int) -> None:
        """Or was, and it is told now."""
        self.end(end, which, ago_ms=ago_ms)

    @rule(wanted=st.integers(1, 4))
    def give_turns(self, wanted: int) -> None:
        assert self.gate.limiter.reserve_slots(self.now, wanted) == self.model.reserve(self.now, wanted)

    @rule(ahead_s=ahead)
    def a_call_fails_by_a_wrong_clock(self, ahead_s: int) -> None:
        now = self.now + timedelta(seconds=ahead_s)
        assert self.gate.record_result("failed", now, now) == self.model.report("failed", now, now, None)


@pytest.mark.parametrize("machine", [Budget, Breaker])
def test_whatever_it_is_told_the_gate_does_what_the_model_does(redis: "Redis", machine: type[AgainstAModel]) -> None:
    """In any order, by clocks that are a little apart, or quite wrong."""
    machine.redis = redis
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=70, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
