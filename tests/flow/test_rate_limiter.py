"""The rate limiter: calls keep to the limit, and those with the earliest deadlines are made first."""

import re
from collections.abc import Iterator
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from redis import Redis

from demo.processes import ROOT
from tests.support.admission import ADMITTED, LIMITS, called_payments
from tests.support.databases import Databases
from tests.support.in_process import START, InProcessSystem, MakeSystem, admission_control, in_process_system
from worker import flow
from worker.correlation.admission import MAX_CLOCK_ERROR, MAX_OPEN_DURATION, AdmissionControl
from worker.correlation.redis_client import duration_us
from worker.errors import RateLimited
from worker.runtime import Runtime, build_runtime


@pytest.fixture
def payready(databases: Databases, valkey_url: str) -> Iterator[InProcessSystem]:
    """Create a system with four calls a second and a breaker threshold of three failures."""
    with databases.create() as address, in_process_system(address, valkey_url, LIMITS) as system:
        yield system


def test_calls_over_the_rate_limit_follow_in_deadline_order(payready: InProcessSystem) -> None:
    for name, timeout_s in {"first": 60, "c": 50, "b": 40, "e": 500, "a": 30, "d": 60}.items():
        payready.initiate(name, f"acct_{name}", timeout_s=timeout_s)
    payready.run_tasks()
    assert called_payments(payready) == ["first"]
    payready.pass_time(1)
    assert called_payments(payready) == ["first", "a", "b", "c", "d"]
    payready.pass_time(1)
    assert called_payments(payready) == ["first", "a", "b", "c", "d", "e"]


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
    assert len(called_payments(payready)) == 5
    payready.clock.advance(0.1)
    payready.run_maintenance()
    assert "urgent" in called_payments(payready)
    assert "late" not in called_payments(payready)
    payready.pass_time(3)
    assert sorted(called_payments(payready)) == sorted([*(f"p{n}" for n in range(10)), "late", "urgent"])


def test_reserved_slots_fill_one_second_at_equal_intervals(admission: AdmissionControl) -> None:
    slots = admission.limiter.reserve_slots_of_next_second(START, 10)
    assert slots == [timedelta(milliseconds=250) * n for n in range(4)]
    assert admission.limiter.reserve_slots_of_next_second(START, 10) == []
    assert admission.limiter.reserve_slots_of_next_second(START + timedelta(seconds=0.5), 1) == [timedelta(seconds=0.5)]


@given(steps=st.lists(st.tuples(st.integers(0, 400), st.booleans()), min_size=1, max_size=60))
def test_one_second_has_at_most_a_quarter_more_calls(valkey_url: str, steps: list[tuple[int, bool]]) -> None:
    """This includes calls with and without a reserved slot."""
    with Redis.from_url(valkey_url, decode_responses=True) as redis:
        redis.flushdb()
        admission = admission_control(redis, LIMITS.model_copy(update={"calls_per_s": 20}))
        now, sent = START, []
        for gap_ms, is_sweep in steps:
            now += timedelta(milliseconds=gap_ms)
            if is_sweep:
                sent += [now + pause for pause in admission.limiter.reserve_slots_of_next_second(now, 3)]
            elif admission.admit_calls_or_probe(now, 1, has_slot=False).granted:
                sent.append(now)
        for start in sent:
            assert sum(start <= at < start + timedelta(seconds=1) for at in sent) <= 25


def test_deployments_with_one_api_key_share_its_limits(valkey_url: str) -> None:
    """The provider limits the requests of a key, and fails for all deployments that use it."""

    def start(instance: str | None, api_key: str) -> Runtime:
        settings = LIMITS.model_copy(
            update={"instance": instance, "quiltt_api_key": SecretStr(api_key), "redis_url": valkey_url}
        )
        return build_runtime(settings)

    with Redis.from_url(valkey_url, decode_responses=True) as redis:
        redis.flushdb()
        live, test, other_key = start("live", "key_1"), start("test", "key_1"), start("live", "key_2")
        assert live.admission.admit_calls_or_probe(START, 1, has_slot=False).granted == 1
        assert test.admission.admit_calls_or_probe(START, 1, has_slot=False).granted == 0
        assert other_key.admission.admit_calls_or_probe(START, 1, has_slot=False).granted == 1
        for _ in range(LIMITS.circuit_breaker_failures):
            live.admission.apply_result_to_breaker_and_limiter("failed", START, START)
        assert test.admission.status(START).open_until is not None
        assert other_key.admission.status(START).open_until is None
        assert live.poll_limiter.key == test.poll_limiter.key != other_key.poll_limiter.key
        assert not any("key_1" in key for key in redis.scan_iter())
        for runtime in (live, test, other_key):
            runtime.engine.dispose()


def test_rate_limited_response_stops_all_calls_until_its_reset(payready: InProcessSystem) -> None:
    reset_at = START + timedelta(seconds=7)
    payready.provider.script["acct_a"] = [RateLimited("rate limit", reset_at)]
    payready.initiate("a", "acct_a")
    payready.run_tasks()
    payready.initiate("b", "acct_b")
    payready.run_tasks()
    payready.pass_time(6)
    assert called_payments(payready) == ["a"]
    payready.pass_time(3)
    assert sorted(called_payments(payready)) == ["a", "a", "b"]


def test_delayed_call_is_abandoned_after_the_deadline(payready: InProcessSystem) -> None:
    for n in range(6):
        payready.initiate(f"p{n}", f"acct_p{n}", timeout_s=1)
    payready.run_tasks()
    payready.clock.advance(2)
    payready.run_maintenance()
    payready.pass_time(2)
    assert called_payments(payready) == ["p0"]
    assert payready.refreshes("acct_p5") == ["abandoned"]
    assert payready.state_or_reason("p5") == "timeout"
    assert "no call was made" in payready.outcome("p5")["detail"]


def test_admission_fails_open_without_redis(payready: InProcessSystem) -> None:
    for name in ("a", "b", "c"):
        payready.initiate(name, f"acct_{name}")
    with payready.redis_unavailable():
        payready.run_tasks()
        assert called_payments(payready) == ["a", "b", "c"]


@pytest.mark.slow
def test_overload_still_releases_payments_in_time(make_system: MakeSystem, databases: Databases) -> None:
    """Six payments a second, four calls a second, a balance after 5 s: four of six payments can be released."""
    seconds = 90 if databases.is_sqlite else 60
    with make_system(calls_per_s=4, circuit_breaker_failures=1000, min_time_left_for_call_s=7) as payready:
        balances_due: list[tuple[int, str]] = []
        call_count = 0
        for second in range(seconds):
            for n in range(6):
                payready.initiate(f"p{second}_{n}", f"acct_{second}x{n}", timeout_s=20)
            payready.run_tasks()
            payready.pass_time(1)
            balances_due += [(second + 5, account) for account in payready.provider.calls[call_count:]]
            call_count = len(payready.provider.calls)
            for at, account in balances_due:
                if at == second:
                    payready.balance(account)
            payready.run_tasks()
        released = payready.rows("SELECT payment_id FROM payment WHERE state = 'released'")
        after_30_s = [row for row in released if int(row["payment_id"][1:].split("_")[0]) >= 30]
        assert len(after_30_s) > (seconds - 30) * 4 / 3, "calls are made for payments that expire before the balance"


def test_clock_that_is_ahead_does_not_stop_all_calls(admission: AdmissionControl) -> None:
    admission.admit_calls_or_probe(START + timedelta(hours=1), 1, has_slot=False)
    assert admission.admit_calls_or_probe(START + timedelta(seconds=61), 1, has_slot=False) == ADMITTED


def test_worker_with_a_clock_behind_the_sweep_makes_the_call(make_system: MakeSystem) -> None:
    """The first slot of a second is enqueued without an ETA."""
    with make_system(calls_per_s=4) as payready:
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


def test_repeated_job_gains_no_earlier_slot(make_system: MakeSystem) -> None:
    """Jobs are idempotent, so the payments service may send each of them twice."""
    with make_system(calls_per_s=4) as payready:
        for _ in range(2):
            for n in range(20):
                payready.initiate(f"p{n}", f"acct_{n}", timeout_s=60)
            payready.run_tasks()
        assert len(payready.provider.calls) == 1


def test_new_payment_takes_no_slot_while_calls_are_delayed(make_system: MakeSystem) -> None:
    """40 calls are delayed. Each sweep requests one second's slots and gets all of them."""
    with make_system(calls_per_s=20) as payready:
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


def test_scripts_ignore_times_of_a_wrong_clock_from_the_same_limit() -> None:
    """The Lua scripts cannot read the constants of `admission.py`."""
    limit = str(duration_us(MAX_OPEN_DURATION + MAX_CLOCK_ERROR))
    scripts = {path.name: path.read_text() for path in (ROOT / "worker/correlation").glob("*.lua")}
    with_limit = {name for name, script in scripts.items() if limit in script}
    assert with_limit == {"admit.lua", "exhaust.lua", "record_result.lua", "reserve_slots.lua"}
    numbers = {number for script in scripts.values() for number in re.findall(r"\b\d{6,}\b", script)}
    assert numbers == {limit, "1000000"}  # and one second
