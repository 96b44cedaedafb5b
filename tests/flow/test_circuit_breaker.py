"""The circuit breaker: consecutive failures stop all calls, and a successful probe closes it."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any, Literal, cast

import pytest

from tests.support.admission import ADMITTED, FAILURE, LIMITS, UNCHANGED, called_payments, fail_until_open, opened_until
from tests.support.databases import Databases
from tests.support.in_process import (
    SETTINGS,
    START,
    InProcessSystem,
    MakeSystem,
    admission_control,
    in_process_system,
)
from worker import flow
from worker.correlation.admission import (
    ANNOUNCEMENT_TTL,
    DELAYED_CALLS_FIRST,
    MAX_OPEN_DURATION,
    OPEN_DURATION,
    Admission,
    AdmissionControl,
    AdmissionStatus,
    Denied,
)
from worker.correlation.redis_client import create_client
from worker.errors import CallFailed, CallNotSent, CallRejected, CallResultUnknown, FailureReason, RateLimited
from worker.ledger import fee_entries

A = "acct_a"


@pytest.fixture
def payready(databases: Databases, valkey_url: str) -> Iterator[InProcessSystem]:
    """Create a system with four calls a second and a breaker threshold of three failures."""
    with databases.create() as address, in_process_system(address, valkey_url, LIMITS) as system:
        yield system


def denied(reason: Literal["rate_limited", "circuit_open", "half_open"], until: datetime) -> Admission:
    """Return a denied admission: no call is admitted until then."""
    return Admission(granted=0, denied=Denied(reason=reason, until=until))


def test_open_breaker_fails_payments_with_an_early_deadline(
    payready: InProcessSystem,
) -> None:
    fail_until_open(payready)
    payready.initiate("hurried", "acct_hurried", timeout_s=3)
    payready.initiate("patient", "acct_patient", timeout_s=60)
    payready.run_tasks()
    assert called_payments(payready) == ["f0", "f1", "f2"]
    assert payready.state_or_reason("hurried") == "provider_unavailable"
    detail = "calls to Quiltt fail; no call is made before 2026-11-22T12:00:07Z"
    assert payready.outcome("hurried")["detail"] == detail
    assert payready.fees("acct_hurried") == []
    assert payready.state_or_reason("patient") == "waiting"


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
    assert sorted(called_payments(payready)[3:]) == ["a", "b", "c"]


def probe_is_in_progress(payready: InProcessSystem) -> bool:
    admission = payready.rt.admission.admit_calls_or_probe(payready.clock(), 1, has_slot=True)
    return admission.denied is not None and admission.denied.reason == "half_open"


def test_failed_probe_doubles_the_open_duration(admission: AdmissionControl) -> None:
    now, pauses = START, []
    for _ in range(2):
        assert admission.apply_result_to_breaker_and_limiter("failed", now, now) == UNCHANGED
    for _ in range(6):
        admits_from = opened_until(admission.apply_result_to_breaker_and_limiter("failed", now, now))
        pauses.append(admits_from - now)
        just_before = admission.admit_calls_or_probe(admits_from - timedelta(microseconds=1), 1, has_slot=False)
        assert just_before == denied("circuit_open", admits_from)
        now = admits_from
        assert admission.admit_calls_or_probe(now, 1, has_slot=False) == ADMITTED
        assert admission.admit_calls_or_probe(now, 1, has_slot=True) == denied("half_open", now + timedelta(seconds=1))
    assert pauses == [OPEN_DURATION * 2**n for n in range(4)] + [MAX_OPEN_DURATION] * 2


def test_breaker_counts_consecutive_failures_and_a_rejection_is_none(payready: InProcessSystem) -> None:
    results: list[CallFailed] = [
        FAILURE,
        CallNotSent("no connection"),
        CallRejected(404, FailureReason.ACCOUNT_NOT_FOUND, "unknown"),
        FAILURE,
        RateLimited("rate limit", None),
        FAILURE,
        CallNotSent("no connection"),
    ]
    for n, result in enumerate(results):
        payready.provider.script[f"acct_f{n}"] = [result]
        payready.initiate(f"f{n}", f"acct_f{n}", timeout_s=300)
        payready.run_tasks()
        assert called_payments(payready)[-1] == f"f{n}"
        payready.clock.advance(2)
    payready.initiate("p", "acct_p")
    payready.run_tasks()
    assert called_payments(payready)[-1] == "p"


def test_success_of_usual_call_is_not_sent_to_redis(payready: InProcessSystem) -> None:
    """It would change nothing: the breaker is closed and has counted no failure."""
    payready.initiate("first", "acct_first", timeout_s=60)
    payready.run_tasks()  # loads the scripts
    payready.clock.advance(1)
    payready.initiate("a", "acct_a", timeout_s=60)
    before = scripts_run(payready)
    payready.run_tasks()
    assert called_payments(payready) == ["first", "a"]
    assert scripts_run(payready) - before == 2, "admit.lua and mark_called.lua"


def scripts_run(payready: InProcessSystem) -> int:
    """Return how many scripts Redis has run."""
    statistics = cast(dict[str, dict[str, int]], payready.rt.correlation._redis.info("commandstats"))
    return statistics["cmdstat_evalsha"]["calls"]


def test_replica_that_admits_after_a_failure_of_another_one_resets_the_count(
    admission: AdmissionControl, valkey_url: str
) -> None:
    """Only a replica that has seen no failure leaves out its successes."""
    with create_client(valkey_url) as redis:
        other = admission_control(redis, LIMITS)
        assert other.admit_calls_or_probe(START, 1, has_slot=True) == ADMITTED
        for _ in range(2):
            admission.apply_result_to_breaker_and_limiter("failed", START, START)
        assert other.admit_calls_or_probe(START, 1, has_slot=True) == ADMITTED
        other.apply_result_to_breaker_and_limiter("ok", START, START)
        for _ in range(2):
            assert admission.apply_result_to_breaker_and_limiter("failed", START, START) == UNCHANGED
        admission.apply_result_to_breaker_and_limiter("ok", START, START)
        for _ in range(2):
            assert admission.apply_result_to_breaker_and_limiter("failed", START, START) == UNCHANGED


def test_failure_during_an_admission_is_reset_by_the_next_success(
    admission: AdmissionControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure is counted after Redis has admitted the call, and before this process knows of the admission."""
    admit = admission._admit

    def admit_and_fail(keys: list[str], arguments: list[Any]) -> Any:
        reply = admit(keys, arguments)
        admission.apply_result_to_breaker_and_limiter("failed", START, START)
        return reply

    monkeypatch.setattr(admission, "_admit", admit_and_fail)
    assert admission.admit_calls_or_probe(START, 1, has_slot=True) == ADMITTED
    admission.apply_result_to_breaker_and_limiter("ok", START, START)
    for _ in range(2):
        assert admission.apply_result_to_breaker_and_limiter("failed", START, START) == UNCHANGED


def test_late_failure_does_not_prolong_the_open_breaker(admission: AdmissionControl) -> None:
    for _ in range(3):
        change = admission.apply_result_to_breaker_and_limiter("failed", START, START)
    assert admission.apply_result_to_breaker_and_limiter("failed", START, START + timedelta(seconds=1)) == UNCHANGED
    assert admission.admit_calls_or_probe(opened_until(change), 1, has_slot=False) == ADMITTED


def test_response_from_before_the_opening_does_not_close_the_breaker(payready: InProcessSystem) -> None:
    """Accepted calls are recorded in batches, a moment after their responses; failed ones at once."""
    payready.initiate("a", "acct_a", timeout_s=60)
    [claim] = flow.claim_delay_or_reject_calls(payready.rt, payready.queue.calls).claims
    result = flow.make_call_unless_claim_is_old(payready.rt, claim)
    payready.drop_tasks()
    payready.clock.advance(1)
    fail_until_open(payready)
    admits_from = payready.rt.admission.status(payready.clock.now).open_until
    assert admits_from is not None
    flow.report_and_record_results(payready.rt, [result])
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


def test_delayed_call_is_made_after_a_redis_flush(payready: InProcessSystem) -> None:
    fail_until_open(payready)
    payready.initiate("a", "acct_a", timeout_s=60)
    payready.run_tasks()
    payready.flush()
    payready.pass_time(int(OPEN_DURATION.total_seconds()) + 1)
    assert called_payments(payready)[-1] == "a"
    assert DELAYED_CALLS_FIRST < OPEN_DURATION


@pytest.mark.parametrize("timeout_s", [45, 120])
def test_call_claimed_during_a_probe_is_made_soon_after(make_system: MakeSystem, timeout_s: int) -> None:
    """The probe's response arrives after 300 ms."""
    with make_system(calls_per_s=20, circuit_breaker_failures=3) as payready:
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
        assert payready.state_or_reason("other") == "waiting"
        assert "acct_b" in payready.provider.calls


def test_refund_of_an_earlier_call_admits_no_second_probe(admission: AdmissionControl) -> None:
    assert admission.admit_calls_or_probe(START, 1, has_slot=False) == ADMITTED
    for _ in range(3):
        admission.apply_result_to_breaker_and_limiter("failed", START, START + timedelta(seconds=1))
    later = START + timedelta(seconds=1) + OPEN_DURATION
    assert admission.admit_calls_or_probe(later, 1, has_slot=False) == ADMITTED, "the probe"
    admission.refund_slots_and_probe(1, START)
    assert admission.admit_calls_or_probe(later, 1, has_slot=True).granted == 0
    admission.refund_slots_and_probe(1, later)
    assert admission.admit_calls_or_probe(later, 1, has_slot=True) == ADMITTED, "the probe was not made"


def test_failure_of_an_earlier_call_is_no_failed_probe(admission: AdmissionControl) -> None:
    """The provider hangs: calls sent before the opening time out after the breaker admits a probe."""
    for _ in range(3):
        first = admission.apply_result_to_breaker_and_limiter("failed", START, START)
    late_failure_at = opened_until(first) + timedelta(milliseconds=50)
    admission.apply_result_to_breaker_and_limiter("failed", START, late_failure_at)
    assert admission.admit_calls_or_probe(late_failure_at, 1, has_slot=True) == ADMITTED, (
        "the breaker stays open for twice as long without a probe"
    )


def test_clock_that_is_ahead_erases_neither_rate_limit_nor_failures(admission: AdmissionControl) -> None:
    """One replica's clock is an hour ahead, in an admitted call and in a failed one."""
    admission.admit_calls_or_probe(START + timedelta(hours=1), 1, has_slot=False)
    admission.apply_result_to_breaker_and_limiter("rate_limited", START, START, START + timedelta(seconds=7))
    assert admission.admit_calls_or_probe(START + timedelta(seconds=6.9), 1, has_slot=False).granted == 0
    for _ in range(3):
        admission.apply_result_to_breaker_and_limiter("failed", START, START + timedelta(hours=1))
    assert admission.apply_result_to_breaker_and_limiter("failed", START, START).kind == "opened", (
        "all calls fail, but the breaker stays closed"
    )


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


def test_status_is_read_only(admission: AdmissionControl) -> None:
    """It shows the used burst, and the breaker as open, half-open and closed."""
    assert admission.status(START) == AdmissionStatus(breaker="closed", open_until=None, burst_used_ratio=0.0)
    assert admission.admit_calls_or_probe(START, 1, has_slot=False) == ADMITTED
    assert admission.status(START) == AdmissionStatus(breaker="closed", open_until=None, burst_used_ratio=1.0)
    assert admission.status(START + timedelta(seconds=0.125)).burst_used_ratio == 0.5
    for _ in range(3):
        admission.apply_result_to_breaker_and_limiter("failed", START, START)
    assert admission.status(START).open_until == START + OPEN_DURATION
    assert admission.status(START).breaker == "open"
    assert admission.status(START + OPEN_DURATION).open_until is None, "the next call is the probe"
    assert admission.status(START + OPEN_DURATION).breaker == "half_open"
    assert admission.status(START - timedelta(hours=1)).open_until is None, "the breaker opened by a wrong clock"
    admission.apply_result_to_breaker_and_limiter("ok", START, START)
    assert admission.status(START).open_until is None
    assert admission.status(START).breaker == "closed"


def test_announced_keys_show_their_limits_to_a_process_without_the_key(payready: InProcessSystem) -> None:
    """An announcement that is not repeated expires."""
    announced, clock = payready.rt.announced_admission, payready.clock
    assert announced.statuses(clock.now) == []
    flow.announce_api_key(payready.rt)
    assert announced.statuses(clock.now) == [payready.rt.admission.status(clock.now)]
    fail_until_open(payready)
    assert [status.breaker for status in announced.statuses(clock.now)] == ["open"]
    assert announced.statuses(clock.now + ANNOUNCEMENT_TTL + timedelta(seconds=1)) == []
