"""Admission control: calls keep to the rate limit, the most urgent first, and stop while the breaker is open."""

import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis

from demo.processes import ROOT
from tests.support.in_process import (
    SETTINGS,
    START,
    Databases,
    InProcessSystem,
    MakeSystem,
    admission_control,
    in_process_system,
)
from worker import flow
from worker.correlation.admission import (
    DELAYED_CALLS_FIRST,
    MAX_CLOCK_ERROR,
    MAX_OPEN_DURATION,
    OPEN_DURATION,
    Admission,
    AdmissionControl,
    AdmissionStatus,
    BreakerChange,
    Denied,
)
from worker.correlation.redis_client import duration_us
from worker.errors import CallFailed, CallNotSent, CallRejected, CallResultUnknown, FailureReason, RateLimited
from worker.ledger import fee_entries

LIMITS = SETTINGS.model_copy(update={"calls_per_s": 4, "circuit_breaker_failures": 3})
FAILURE = CallResultUnknown("the provider answered 500", 500)
A = "acct_a"
ADMITTED = Admission(granted=1, denied=None)
UNCHANGED = BreakerChange(kind="unchanged")


def denied(reason: Literal["rate_limited", "circuit_open", "half_open"], until: datetime) -> Admission:
    """Return a denied admission: no call is admitted until then."""
    return Admission(granted=0, denied=Denied(reason=reason, until=until))


def opened_until(change: BreakerChange) -> datetime:
    """Return when a circuit breaker that just opened admits calls again."""
    assert change.kind == "opened"
    assert change.open_until is not None
    return change.open_until


@pytest.fixture
def payready(databases: Databases, valkey_url: str) -> Iterator[InProcessSystem]:
    """Create a system with four calls a second and a breaker threshold of three failures."""
    with databases.create() as address, in_process_system(address, valkey_url, LIMITS) as made:
        yield made


@pytest.fixture
def gate(valkey_url: str) -> Iterator[AdmissionControl]:
    with Redis.from_url(valkey_url, decode_responses=True) as redis:
        redis.flushdb()
        yield admission_control(redis, LIMITS)


def called(payready: InProcessSystem) -> list[str]:
    """Return the payments whose accounts were called, in that order."""
    return [account.removeprefix("acct_") for account in payready.provider.calls]


# --- rate limiter -----------------------------------------------------------------------------------------------------


def test_calls_over_the_rate_limit_follow_in_deadline_order(payready: InProcessSystem) -> None:
    for name, timeout_s in {"first": 60, "c": 50, "b": 40, "e": 500, "a": 30, "d": 60}.items():
        payready.initiate(name, f"acct_{name}", timeout_s=timeout_s)
    payready.run_tasks()
    assert called(payready) == ["first"]
    payready.pass_time(1)
    assert called(payready) == ["first", "a", "b", "c", "d"]
    payready.pass_time(1)
    assert called(payready) == ["first", "a", "b", "c", "d", "e"]


def test_new_payment_queues_behind_more_urgent_ones(
    payready: InProcessSystem,
) -> None:
    for n in range(10):
        payready.initiate(f"p{n}", f"acct_p{n}", timeout_s=60)
    payready.run_tasks()
    payready.pass_time(1)
    payready.clock.advance(0.9)
    payready.initiate("late", "acct_late", timeout_s=600)
    payready.initiate("urgent", "acct_urgent", timeout_s=10)
    payready.run_tasks()
    assert len(called(payready)) == 5
    payready.clock.advance(0.1)
    payready.run_maintenance()
    assert "urgent" in called(payready)
    assert "late" not in called(payready)
    payready.pass_time(3)
    assert sorted(called(payready)) == sorted([*(f"p{n}" for n in range(10)), "late", "urgent"])


def test_reserved_slots_fill_one_second_at_equal_intervals(gate: AdmissionControl) -> None:
    slots = gate.limiter.reserve_slots_of_next_second(START, 10)
    assert slots == [timedelta(milliseconds=250) * n for n in range(4)]
    assert gate.limiter.reserve_slots_of_next_second(START, 10) == []
    assert gate.limiter.reserve_slots_of_next_second(START + timedelta(seconds=0.5), 1) == [timedelta(seconds=0.5)]


@given(steps=st.lists(st.tuples(st.integers(0, 400), st.booleans()), min_size=1, max_size=60))
def test_one_second_has_at_most_a_quarter_more_calls(valkey_url: str, steps: list[tuple[int, bool]]) -> None:
    """This includes calls with and without a reserved slot."""
    with Redis.from_url(valkey_url, decode_responses=True) as redis:
        redis.flushdb()
        gate = admission_control(redis, LIMITS.model_copy(update={"calls_per_s": 20}))
        now, sent = START, []
        for gap_ms, is_sweep in steps:
            now += timedelta(milliseconds=gap_ms)
            if is_sweep:
                sent += [now + pause for pause in gate.limiter.reserve_slots_of_next_second(now, 3)]
            elif gate.admit_calls_or_probe(now, 1, has_slot=False).granted:
                sent.append(now)
        for start in sent:
            assert sum(start <= at < start + timedelta(seconds=1) for at in sent) <= 25


def test_rate_limited_response_stops_all_calls_until_its_reset(payready: InProcessSystem) -> None:
    reset_at = START + timedelta(seconds=7)
    payready.provider.script["acct_a"] = [RateLimited("rate limit", reset_at)]
    payready.initiate("a", "acct_a")
    payready.run_tasks()
    payready.initiate("b", "acct_b")
    payready.run_tasks()
    payready.pass_time(6)
    assert called(payready) == ["a"]
    payready.pass_time(3)
    assert sorted(called(payready)) == ["a", "a", "b"]


def test_delayed_call_is_abandoned_after_the_deadline(payready: InProcessSystem) -> None:
    for n in range(6):
        payready.initiate(f"p{n}", f"acct_p{n}", timeout_s=1)
    payready.run_tasks()
    payready.clock.advance(2)
    payready.run_maintenance()
    payready.pass_time(2)
    assert called(payready) == ["p0"]
    assert payready.refreshes("acct_p5") == ["abandoned"]
    assert payready.state("p5") == "timeout"
    assert "no call was made" in payready.outcome("p5")["detail"]


# --- circuit breaker --------------------------------------------------------------------------------------------------


def fail_until_open(payready: InProcessSystem) -> None:
    for n in range(3):
        payready.provider.script[f"acct_f{n}"] = [FAILURE]
        payready.initiate(f"f{n}", f"acct_f{n}", timeout_s=300)
        payready.run_tasks()
        payready.clock.advance(1)


def test_open_breaker_fails_payments_with_an_early_deadline(
    payready: InProcessSystem,
) -> None:
    fail_until_open(payready)
    payready.initiate("hurried", "acct_hurried", timeout_s=3)
    payready.initiate("patient", "acct_patient", timeout_s=60)
    payready.run_tasks()
    assert called(payready) == ["f0", "f1", "f2"]
    assert payready.state("hurried") == "provider_unavailable"
    detail = "provider calls fail; no call is made before 2026-11-22T12:00:07Z"
    assert payready.outcome("hurried")["detail"] == detail
    assert payready.fees("acct_hurried") == []
    assert payready.state("patient") == "waiting"


def test_successful_probe_closes_the_breaker(payready: InProcessSystem) -> None:
    fail_until_open(payready)
    for name in ("a", "b"):
        payready.initiate(name, f"acct_{name}", timeout_s=60)
    payready.run_tasks()

    def assert_no_other_call() -> int:
        payready.initiate("c", "acct_c", timeout_s=60)
        assert probe_is_in_progress(payready)
        return 202

    payready.provider.script["acct_a"] = payready.provider.script["acct_b"] = [assert_no_other_call]
    payready.pass_time(int(OPEN_DURATION.total_seconds()) + 4)
    assert sorted(called(payready)[3:]) == ["a", "b", "c"]


def probe_is_in_progress(payready: InProcessSystem) -> bool:
    admission = payready.rt.admission.admit_calls_or_probe(payready.clock(), 1, has_slot=True)
    return admission.denied is not None and admission.denied.reason == "half_open"


def test_failed_probe_doubles_the_open_duration(gate: AdmissionControl) -> None:
    now, pauses = START, []
    for _ in range(2):
        assert gate.apply_result_to_breaker_and_limiter("failed", now, now) == UNCHANGED
    for _ in range(6):
        admits_from = opened_until(gate.apply_result_to_breaker_and_limiter("failed", now, now))
        pauses.append(admits_from - now)
        just_before = gate.admit_calls_or_probe(admits_from - timedelta(microseconds=1), 1, has_slot=False)
        assert just_before == denied("circuit_open", admits_from)
        now = admits_from
        assert gate.admit_calls_or_probe(now, 1, has_slot=False) == ADMITTED
        assert gate.admit_calls_or_probe(now, 1, has_slot=True) == denied("half_open", now + timedelta(seconds=1))
    assert pauses == [OPEN_DURATION * 2**n for n in range(4)] + [MAX_OPEN_DURATION] * 2


def test_breaker_counts_consecutive_failures_and_a_rejection_is_none(payready: InProcessSystem) -> None:
    answers: list[CallFailed] = [
        FAILURE,
        CallNotSent("no connection"),
        CallRejected(404, FailureReason.ACCOUNT_NOT_FOUND, "unknown"),
        FAILURE,
        RateLimited("rate limit", None),
        FAILURE,
        CallNotSent("no connection"),
    ]
    for n, answer in enumerate(answers):
        payready.provider.script[f"acct_f{n}"] = [answer]
        payready.initiate(f"f{n}", f"acct_f{n}", timeout_s=300)
        payready.run_tasks()
        assert called(payready)[-1] == f"f{n}"
        payready.clock.advance(2)
    payready.initiate("p", "acct_p")
    payready.run_tasks()
    assert called(payready)[-1] == "p"


def test_late_failure_does_not_prolong_the_open_breaker(gate: AdmissionControl) -> None:
    for _ in range(3):
        change = gate.apply_result_to_breaker_and_limiter("failed", START, START)
    assert gate.apply_result_to_breaker_and_limiter("failed", START, START + timedelta(seconds=1)) == UNCHANGED
    assert gate.admit_calls_or_probe(opened_until(change), 1, has_slot=False) == ADMITTED


def test_response_from_before_the_opening_does_not_close_the_breaker(payready: InProcessSystem) -> None:
    """Accepted calls are recorded in batches, a moment after their responses; failed ones at once."""
    payready.initiate("a", "acct_a", timeout_s=60)
    [claim] = flow.claim_delay_or_reject_calls(payready.rt, payready.queue.calls).claims
    end = flow.make_call_unless_claim_is_old(payready.rt, claim)
    payready.drop_tasks()
    payready.clock.advance(1)
    fail_until_open(payready)
    admits_from = payready.rt.admission.status(payready.clock.now).open_until
    assert admits_from is not None
    flow.report_and_record_results(payready.rt, [end])
    assert payready.fees("acct_a") == ["1 pending", "1 posted"]
    assert payready.rt.admission.status(payready.clock.now).open_until == admits_from


def test_earlier_call_with_a_response_after_the_opening_closes_the_breaker(payready: InProcessSystem) -> None:
    """The response was slow, but the provider is available."""
    payready.initiate("a", "acct_a", timeout_s=60)
    [claim] = flow.claim_delay_or_reject_calls(payready.rt, payready.queue.calls).claims
    payready.drop_tasks()
    payready.clock.advance(1)
    fail_until_open(payready)
    flow.report_and_record_results(payready.rt, [flow.make_call_unless_claim_is_old(payready.rt, claim)])
    assert payready.rt.admission.status(payready.clock.now).open_until is None


def test_admission_fails_open_without_redis(payready: InProcessSystem) -> None:
    for name in ("a", "b", "c"):
        payready.initiate(name, f"acct_{name}")
    with payready.redis_unavailable():
        payready.run_tasks()
        assert called(payready) == ["a", "b", "c"]


def test_delayed_call_is_made_after_a_redis_flush(payready: InProcessSystem) -> None:
    fail_until_open(payready)
    payready.initiate("a", "acct_a", timeout_s=60)
    payready.run_tasks()
    payready.flush()
    payready.pass_time(int(OPEN_DURATION.total_seconds()) + 1)
    assert called(payready)[-1] == "a"
    assert DELAYED_CALLS_FIRST < OPEN_DURATION


@pytest.mark.parametrize("timeout_s", [45, 120])
def test_call_claimed_during_a_probe_is_made_soon_after(made: MakeSystem, timeout_s: int) -> None:
    """The probe's response arrives after 300 ms."""
    with made(calls_per_s=20, circuit_breaker_failures=3) as payready:
        fail_until_open(payready)
        payready.clock.advance(OPEN_DURATION.total_seconds())
        payready.initiate("probe", A, timeout_s=120)

        def probe() -> int:
            other = payready.initiate("other", "acct_b", timeout_s=timeout_s)
            payready.drop_tasks()
            payready.queue.add(flow.claim_and_call(payready.rt, "acct_b", str(other.refresh_id)))
            payready.clock.advance(0.3)
            return 202

        payready.provider.script[A] = [probe]
        payready.run_tasks()
        payready.pass_time(4)
        assert payready.state("other") == "waiting"
        assert "acct_b" in payready.provider.calls


def test_refund_of_an_earlier_call_admits_no_second_probe(gate: AdmissionControl) -> None:
    assert gate.admit_calls_or_probe(START, 1, has_slot=False) == ADMITTED
    for _ in range(3):
        gate.apply_result_to_breaker_and_limiter("failed", START, START + timedelta(seconds=1))
    later = START + timedelta(seconds=1) + OPEN_DURATION
    assert gate.admit_calls_or_probe(later, 1, has_slot=False) == ADMITTED, "the probe"
    gate.refund_slots_and_probe(1, START)
    assert gate.admit_calls_or_probe(later, 1, has_slot=True).granted == 0
    gate.refund_slots_and_probe(1, later)
    assert gate.admit_calls_or_probe(later, 1, has_slot=True) == ADMITTED, "the probe was not made"


def test_failure_of_an_earlier_call_is_no_failed_probe(gate: AdmissionControl) -> None:
    """The provider hangs: calls sent before the opening time out after the breaker admits a probe."""
    for _ in range(3):
        first = gate.apply_result_to_breaker_and_limiter("failed", START, START)
    late_failure_at = opened_until(first) + timedelta(milliseconds=50)
    gate.apply_result_to_breaker_and_limiter("failed", START, late_failure_at)
    assert gate.admit_calls_or_probe(late_failure_at, 1, has_slot=True) == ADMITTED, (
        "the breaker stays open for twice as long without a probe"
    )


def test_overload_still_releases_payments_in_time(made: MakeSystem, databases: Databases) -> None:
    """Six payments a second, four calls a second, a balance after 5 s: four of six payments can be released."""
    seconds = 90 if databases.is_sqlite else 60
    with made(calls_per_s=4, circuit_breaker_failures=1000, min_time_left_for_call_s=7) as payready:
        answers: list[tuple[int, str]] = []
        seen = 0
        for second in range(seconds):
            for n in range(6):
                payready.initiate(f"p{second}_{n}", f"acct_{second}x{n}", timeout_s=20)
            payready.run_tasks()
            payready.pass_time(1)
            answers += [(second + 5, account) for account in payready.provider.calls[seen:]]
            seen = len(payready.provider.calls)
            for at, account in answers:
                if at == second:
                    payready.balance(account)
            payready.run_tasks()
        ended = payready.rows("SELECT payment_id FROM payment WHERE state = 'released'")
        late = [row for row in ended if int(row["payment_id"][1:].split("_")[0]) >= 30]
        assert len(late) > (seconds - 30) * 4 / 3, "calls are made for payments that expire before the balance"


def test_clock_that_is_ahead_does_not_stop_all_calls(gate: AdmissionControl) -> None:
    gate.admit_calls_or_probe(START + timedelta(hours=1), 1, has_slot=False)
    assert gate.admit_calls_or_probe(START + timedelta(seconds=61), 1, has_slot=False) == ADMITTED


def test_clock_that_is_ahead_erases_neither_rate_limit_nor_failures(gate: AdmissionControl) -> None:
    """One replica's clock is an hour ahead, in an admitted call and in a failed one."""
    gate.admit_calls_or_probe(START + timedelta(hours=1), 1, has_slot=False)
    gate.apply_result_to_breaker_and_limiter("rate_limited", START, START, START + timedelta(seconds=7))
    assert gate.admit_calls_or_probe(START + timedelta(seconds=6.9), 1, has_slot=False).granted == 0
    for _ in range(3):
        gate.apply_result_to_breaker_and_limiter("failed", START, START + timedelta(hours=1))
    assert gate.apply_result_to_breaker_and_limiter("failed", START, START).kind == "opened", (
        "all calls fail, but the breaker stays closed"
    )


def test_worker_with_a_clock_behind_the_sweep_makes_the_call(made: MakeSystem) -> None:
    """The first slot of a second is enqueued without an ETA."""
    with made(calls_per_s=4) as payready:
        for n in range(3):
            payready.initiate(f"p{n}", f"acct_{n}", timeout_s=60)
        payready.run_tasks()
        payready.clock.advance(1)
        after = flow.sweep_refreshes_and_balances(payready.rt)
        first = after.calls[0]
        assert (first.has_slot, first.delay) == (True, timedelta(0))
        payready.clock.advance(-0.02)
        flow.claim_and_call(payready.rt, first.account_id, first.refresh_id, has_slot=True)
        assert first.account_id in payready.provider.calls


def test_repeated_job_gains_no_earlier_slot(made: MakeSystem) -> None:
    """Jobs are idempotent, so the payments service may send each of them twice."""
    with made(calls_per_s=4) as payready:
        for _ in range(2):
            for n in range(20):
                payready.initiate(f"p{n}", f"acct_{n}", timeout_s=60)
            payready.run_tasks()
        assert len(payready.provider.calls) == 1


def test_new_payment_takes_no_slot_while_calls_are_delayed(made: MakeSystem) -> None:
    """40 calls are delayed. Each sweep requests one second's slots and gets all of them."""
    with made(calls_per_s=20) as payready:
        for n in range(80):
            payready.initiate(f"p{n:02}", f"acct_{n}", timeout_s=60)
        payready.run_tasks()
        payready.clock.advance(1)
        payready.run_maintenance()
        payready.clock.advance(1)
        payready.run_maintenance()
        payready.clock.advance(0.95)
        payready.initiate("newcomer", "acct_new", timeout_s=3600)
        payready.run_tasks()
        assert "acct_new" not in payready.provider.calls


def test_rolled_back_claim_of_a_probe_does_not_keep_the_breaker_open(
    databases: Databases, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Admission precedes the commit of the claim, so a rollback leaves a probe that is never sent."""
    settings = SETTINGS.model_copy(update={"calls_per_s": 20, "circuit_breaker_failures": 1})
    with databases.create() as address, in_process_system(address, valkey_url, settings) as payready:
        payready.provider.script["acct_f"] = [CallResultUnknown("500", 500)]
        payready.initiate("f", "acct_f", timeout_s=300)
        payready.run_tasks()
        payready.clock.advance(OPEN_DURATION.total_seconds())
        payready.initiate("a", "acct_a", timeout_s=300)
        with monkeypatch.context() as patch:

            def fail_to_open(*_: object) -> None:
                raise ConnectionError("the ledger is unavailable")

            patch.setattr(fee_entries, "open_entries", fail_to_open)
            with pytest.raises(ConnectionError):
                payready.run_tasks()
        payready.drop_tasks()
        payready.pass_time(20)
        assert "acct_a" in payready.provider.calls


def test_status_is_read_only(gate: AdmissionControl) -> None:
    """It shows the used burst, and the breaker as open, half-open and closed."""
    assert gate.status(START) == AdmissionStatus(open_until=None, burst_used_ratio=0.0)
    assert gate.admit_calls_or_probe(START, 1, has_slot=False) == ADMITTED
    assert gate.status(START) == AdmissionStatus(open_until=None, burst_used_ratio=1.0)
    assert gate.status(START + timedelta(seconds=0.125)).burst_used_ratio == 0.5
    for _ in range(3):
        gate.apply_result_to_breaker_and_limiter("failed", START, START)
    assert gate.status(START).open_until == START + OPEN_DURATION
    assert gate.status(START + OPEN_DURATION).open_until is None, "the next call is the probe"
    assert gate.status(START - timedelta(hours=1)).open_until is None, "the breaker opened by a wrong clock"
    gate.apply_result_to_breaker_and_limiter("ok", START, START)
    assert gate.status(START).open_until is None


def test_scripts_ignore_times_of_a_wrong_clock_from_the_same_limit() -> None:
    """The Lua scripts cannot read the constants of `admission.py`."""
    limit = str(duration_us(MAX_OPEN_DURATION + MAX_CLOCK_ERROR))
    scripts = {path.name: path.read_text() for path in (ROOT / "worker/correlation").glob("*.lua")}
    with_limit = {name for name, script in scripts.items() if limit in script}
    assert with_limit == {"admit.lua", "exhaust.lua", "record_result.lua", "reserve_slots.lua"}
    numbers = {number for script in scripts.values() for number in re.findall(r"\b\d{6,}\b", script)}
    assert numbers == {limit, "1000000"}  # and one second
