"""Calls go out within a budget, the most urgent first, and not at all while the provider only fails."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis

from tests.support.world import SETTINGS, START, Databases, World, gate_of, world
from worker.correlation.gate import CROWDED, LONGEST_PAUSE, PAUSE, Gate, HeldBack
from worker.errors import CallFailed, Reason, Refused, Throttled, Uncertain, Unsent

LIMITS = SETTINGS.model_copy(update={"calls_per_s": 4, "breaker_failures": 3})
FAILURE = Uncertain("the provider answered 500", 500)


@pytest.fixture
def payready(databases: Databases, valkey_url: str) -> Iterator[World]:
    """Four calls a second, one at a time; three failures in a row are too many."""
    with databases.one() as address, world(address, valkey_url, LIMITS) as made:
        yield made


@pytest.fixture
def gate(valkey_url: str) -> Iterator[Gate]:
    with Redis.from_url(valkey_url, decode_responses=True) as redis:
        redis.flushdb()
        yield gate_of(redis, LIMITS)


def called(payready: World) -> list[str]:
    """The payments whose accounts were called, in that order."""
    return [account.removeprefix("acct_") for account in payready.provider.calls]


# --- the budget -------------------------------------------------------------------------------------------------------


def test_what_is_over_the_budget_is_called_a_second_later_the_nearest_deadline_first(payready: World) -> None:
    for name, timeout_s in {"first": 60, "c": 50, "b": 40, "e": 500, "a": 30, "d": 60}.items():
        payready.initiate(name, f"acct_{name}", timeout_s=timeout_s)
    payready.work()
    assert called(payready) == ["first"]
    payready.pass_time(1)
    assert called(payready) == ["first", "a", "b", "c", "d"]
    payready.pass_time(1)
    assert called(payready) == ["first", "a", "b", "c", "d", "e"]


def test_a_payment_that_comes_while_others_wait_for_their_turn_goes_behind_the_more_urgent(payready: World) -> None:
    for n in range(10):
        payready.initiate(f"p{n}", f"acct_p{n}", timeout_s=60)
    payready.work()
    payready.pass_time(1)
    payready.clock.advance(0.9)
    payready.initiate("late", "acct_late", timeout_s=600)
    payready.initiate("urgent", "acct_urgent", timeout_s=10)
    payready.work()
    assert len(called(payready)) == 5
    payready.clock.advance(0.1)
    payready.tick()
    assert "urgent" in called(payready)
    assert "late" not in called(payready)
    payready.pass_time(3)
    assert sorted(called(payready)) == sorted([*(f"p{n}" for n in range(10)), "late", "urgent"])


def test_places_are_a_second_s_worth_one_interval_apart(gate: Gate) -> None:
    places = gate.reserve(START, 10)
    assert places == [timedelta(milliseconds=250) * n for n in range(4)]
    assert gate.reserve(START, 10) == []
    assert gate.reserve(START + timedelta(seconds=0.5), 1) == [timedelta(seconds=0.5)]


@given(steps=st.lists(st.tuples(st.integers(0, 400), st.booleans()), min_size=1, max_size=60))
def test_no_second_sees_more_than_the_budget_and_a_quarter(valkey_url: str, steps: list[tuple[int, bool]]) -> None:
    """Whether calls come by themselves, or have waited for their places."""
    with Redis.from_url(valkey_url, decode_responses=True) as redis:
        redis.flushdb()
        gate = gate_of(redis, LIMITS.model_copy(update={"calls_per_s": 20}))
        now, gone = START, []
        for gap_ms, is_sweep in steps:
            now += timedelta(milliseconds=gap_ms)
            if is_sweep:
                gone += [now + pause for pause in gate.reserve(now, 3)]
            elif gate.admit(now, in_turn=False) is None:
                gone.append(now)
        for start in gone:
            assert sum(start <= at < start + timedelta(seconds=1) for at in gone) <= 25


def test_a_rate_limit_of_the_provider_stops_all_calls_until_it_listens_again(payready: World) -> None:
    listens_again = START + timedelta(seconds=7)
    payready.provider.script["acct_a"] = [Throttled("rate limit", listens_again)]
    payready.initiate("a", "acct_a")
    payready.work()
    payready.initiate("b", "acct_b")
    payready.work()
    payready.pass_time(6)
    assert called(payready) == ["a"]
    payready.pass_time(3)
    assert sorted(called(payready)) == ["a", "a", "b"]


def test_a_call_that_waited_for_its_turn_until_nobody_waited_for_it_is_not_made(payready: World) -> None:
    for n in range(6):
        payready.initiate(f"p{n}", f"acct_p{n}", timeout_s=1)
    payready.work()
    payready.clock.advance(2)
    payready.tick()
    payready.pass_time(2)
    assert called(payready) == ["p0"]
    assert payready.refreshes("acct_p5") == ["abandoned"]
    assert payready.state("p5") == "timeout"
    assert "no call was made" in payready.outcome("p5")["detail"]


# --- the breaker ------------------------------------------------------------------------------------------------------


def fail_until_shut(payready: World) -> None:
    for n in range(3):
        payready.provider.script[f"acct_f{n}"] = [FAILURE]
        payready.initiate(f"f{n}", f"acct_f{n}", timeout_s=300)
        payready.work()
        payready.clock.advance(1)


def test_when_the_provider_only_fails_no_call_is_made_and_who_cannot_wait_fails_at_once(payready: World) -> None:
    fail_until_shut(payready)
    payready.initiate("hurried", "acct_hurried", timeout_s=3)
    payready.initiate("patient", "acct_patient", timeout_s=60)
    payready.work()
    assert called(payready) == ["f0", "f1", "f2"]
    assert payready.state("hurried") == "provider_unavailable"
    assert "no calls are made until" in payready.outcome("hurried")["detail"]
    assert payready.fees("acct_hurried") == []
    assert payready.state("patient") == "waiting"


def test_one_call_tries_again_and_its_success_lets_all_others_through(payready: World) -> None:
    fail_until_shut(payready)
    for name in ("a", "b"):
        payready.initiate(name, f"acct_{name}", timeout_s=60)
    payready.work()

    def nobody_else_goes() -> int:
        payready.initiate("c", "acct_c", timeout_s=60)
        assert gate_is_shut(payready)
        return 202

    payready.provider.script["acct_a"] = payready.provider.script["acct_b"] = [nobody_else_goes]
    payready.pass_time(int(PAUSE.total_seconds()) + 4)
    assert sorted(called(payready)[3:]) == ["a", "b", "c"]


def gate_is_shut(payready: World) -> bool:
    held_back = payready.rt.gate.admit(payready.clock(), in_turn=True)
    return held_back is not None and held_back.why == "shut"


def test_a_probe_that_fails_shuts_for_twice_as_long(gate: Gate) -> None:
    now, pauses = START, []
    for _ in range(2):
        assert gate.report("failed", now) is None
    for _ in range(6):
        shut_until = gate.report("failed", now)
        assert shut_until is not None
        pauses.append(shut_until - now)
        assert gate.admit(shut_until - timedelta(microseconds=1), in_turn=False) == HeldBack("shut", shut_until)
        now = shut_until
        assert gate.admit(now, in_turn=False) is None
        assert gate.admit(now, in_turn=True) == HeldBack("shut", now + LIMITS.call_limit)
    assert pauses == [PAUSE * 2**n for n in range(4)] + [LONGEST_PAUSE] * 2


def test_failures_count_only_in_a_row_and_a_refusal_is_an_answer(payready: World) -> None:
    answers: list[CallFailed] = [
        FAILURE,
        Unsent("no connection"),
        Refused(404, Reason.ACCOUNT_NOT_FOUND, "unknown"),
        FAILURE,
        Throttled("rate limit", None),
        FAILURE,
        Unsent("no connection"),
    ]
    for n, answer in enumerate(answers):
        payready.provider.script[f"acct_f{n}"] = [answer]
        payready.initiate(f"f{n}", f"acct_f{n}", timeout_s=300)
        payready.work()
        assert called(payready)[-1] == f"f{n}"
        payready.clock.advance(2)
    payready.initiate("p", "acct_p")
    payready.work()
    assert called(payready)[-1] == "p"


def test_a_straggler_does_not_prolong_what_is_shut(gate: Gate) -> None:
    for _ in range(3):
        shut_until = gate.report("failed", START)
    assert gate.report("failed", START + timedelta(seconds=1)) is None
    assert shut_until
    assert gate.admit(shut_until, in_turn=False) is None


def test_a_gate_that_cannot_be_asked_holds_nobody_back(payready: World) -> None:
    for name in ("a", "b", "c"):
        payready.initiate(name, f"acct_{name}")
    with payready.redis_away():
        payready.work()
        assert called(payready) == ["a", "b", "c"]


def test_what_was_held_back_goes_on_when_the_gate_is_forgotten(payready: World) -> None:
    fail_until_shut(payready)
    payready.initiate("a", "acct_a", timeout_s=60)
    payready.work()
    payready.flush()
    payready.pass_time(int(PAUSE.total_seconds()) + 1)
    assert called(payready)[-1] == "a"
    assert CROWDED < PAUSE
