"""Results of calls: what is recorded, reported to admission control, counted and logged."""

import logging
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from tests.support.in_process import InProcessSystem, MakeSystem
from worker import flow, metrics
from worker.correlation.admission import OPEN_DURATION
from worker.errors import CallFailed, CallRejected, CallResultUnknown, ConnectionPoolExhausted, FailureReason
from worker.flow import Claim, calling, resolution
from worker.ledger.refreshes import RefreshRecord

ACCOUNTS = ("acct_1", "acct_2", "acct_3")


def claim_all(payready: InProcessSystem) -> list[Claim]:
    """Claim a call for each of `ACCOUNTS`."""
    for account_id in ACCOUNTS:
        payready.initiate(f"pay_{account_id}", account_id)
    claims = flow.claim_delay_or_reject_calls(payready.rt, payready.queue.calls).claims
    payready.drop_tasks()
    return list(claims)


def events(caplog: pytest.LogCaptureFixture, *names: str) -> list[dict[str, Any]]:
    """Return the logged events with these names."""
    lines: list[Any] = [record.msg for record in caplog.records]
    return [line for line in lines if isinstance(line, dict) and line["event"] in names]


def test_unrecordable_result_does_not_block_the_others(
    payready: InProcessSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised when all others are recorded."""
    first, second, third = claim_all(payready)
    for account_id in ACCOUNTS[:2]:
        payready.provider.script[account_id] = [CallRejected(404, FailureReason.ACCOUNT_NOT_FOUND, "unknown account")]
    reject = resolution.reject_refresh_and_fail_payments

    def reject_refresh(rt: Any, tx: Any, refresh: RefreshRecord, *details: Any) -> flow.FollowUp:
        if refresh.account_id == "acct_1":
            raise OperationalError("UPDATE refresh", {}, Exception("connection lost"))
        return reject(rt, tx, refresh, *details)

    monkeypatch.setattr(calling, "reject_refresh_and_fail_payments", reject_refresh)
    monkeypatch.setattr(calling, "RECORD_RETRY_DELAYS_S", (0,))
    results = [flow.make_call_unless_claim_is_old(payready.rt, claim) for claim in (first, second, third)]
    with pytest.raises(OperationalError, match="connection lost"):
        flow.report_and_record_results(payready.rt, results)
    assert [payready.fees(account_id)[1:] for account_id in ACCOUNTS] == [[], ["1 void"], ["1 posted"]]
    assert payready.state_or_reason("pay_acct_2") == "account_not_found"


def skip(payready: InProcessSystem, claim: Claim) -> flow.CallResult:
    return flow.log_and_count_skipped_call(payready.rt, claim)


def call_too_late(payready: InProcessSystem, claim: Claim) -> flow.CallResult:
    payready.clock.now += flow.MAX_CLAIM_AGE + timedelta(microseconds=1)
    return flow.make_call_unless_claim_is_old(payready.rt, claim)


def call_with_full_pool(payready: InProcessSystem, claim: Claim) -> flow.CallResult:
    payready.provider.script[claim.refresh.account_id] = [ConnectionPoolExhausted("all connections are in use")]
    return flow.make_call_unless_claim_is_old(payready.rt, claim)


@pytest.mark.parametrize("make", [skip, call_too_late, call_with_full_pool])
def test_skipped_call_is_no_failure_of_the_provider(make_system: MakeSystem, make: Any) -> None:
    """Its fee is void, its slot is refunded, and the circuit breaker stays closed."""
    with make_system(circuit_breaker_failures=1, calls_per_s=4) as payready:
        payready.initiate("pay_1", "acct_1")
        [claim] = flow.claim_delay_or_reject_calls(payready.rt, payready.queue.calls).claims
        skipped = metrics.PROVIDER_CALLS.labels("skipped")._value
        before = skipped.get()
        result = make(payready, claim)
        flow.report_and_record_results(payready.rt, [result])
        assert skipped.get() == before + 1
        assert payready.fees("acct_1") == ["1 pending", "1 void"]
        status = payready.rt.admission.status(claim.call.called_at)
        assert (status.open_until, status.burst_used_ratio) == (None, 0)


def test_circuit_breaker_changes_are_logged_once(make_system: MakeSystem, caplog: pytest.LogCaptureFixture) -> None:
    failure: CallFailed = CallResultUnknown("HTTP 503", 503)
    with make_system(circuit_breaker_failures=3) as payready, caplog.at_level(logging.INFO):
        claims = claim_all(payready)
        for account_id in ACCOUNTS:
            payready.provider.script[account_id] = [failure]
        flow.report_and_record_results(
            payready.rt, [flow.make_call_unless_claim_is_old(payready.rt, claim) for claim in claims]
        )
        payready.clock.now += OPEN_DURATION
        for number in range(2):
            payready.initiate(f"pay_probe{number}", f"acct_probe{number}")
            payready.run_tasks()
        opened, closed = events(caplog, "circuit_breaker.opened", "circuit_breaker.closed")
    assert (opened["event"], opened["open_until"]) == ("circuit_breaker.opened", "2026-11-22T12:00:05Z")
    assert (opened["last_error"], opened["level"]) == ("HTTP 503", "error")
    assert (closed["event"], closed["level"]) == ("circuit_breaker.closed", "info")


def test_call_results_are_logged_with_their_ids(payready: InProcessSystem, caplog: pytest.LogCaptureFixture) -> None:
    first, second, _ = claim_all(payready)
    payready.provider.script["acct_2"] = [CallResultUnknown("HTTP 503", 503)]
    with caplog.at_level(logging.INFO):
        flow.report_and_record_results(
            payready.rt, [flow.make_call_unless_claim_is_old(payready.rt, claim) for claim in (first, second)]
        )
    [failed, accepted] = events(caplog, "refresh_call.failed", "refresh_call.accepted")
    assert (accepted["account_id"], accepted["refresh_id"]) == ("acct_1", first.refresh.refresh_id)
    assert (failed["account_id"], failed["refresh_id"]) == ("acct_2", second.refresh.refresh_id)
    assert (failed["result"], failed["status"], failed["error"]) == ("unknown", 503, "HTTP 503")
