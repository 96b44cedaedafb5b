"""Metrics that are read from the ledger."""

import math
from collections.abc import Callable
from decimal import Decimal

import pytest

from tests.support.in_process import InProcessSystem
from worker import flow
from worker.errors import CallResultUnknown
from worker.ledger_metrics import WRITE_LAG, LedgerCollector, admission_metrics
from worker.metric_types import ExpiringValue, Label, MetricDefinition, MetricSample
from worker.metrics import BALANCE_TO_RESOLUTION_SECONDS, CALL_TO_BALANCE_SECONDS
from worker.metrics_collector import CachedQueryCollector

ReadMetric = Callable[..., float]


@pytest.fixture
def exported(payready: InProcessSystem) -> ReadMetric:
    """Return a function that reads a value by metric name and labels, from a collector that started with the test."""
    collector = LedgerCollector(payready.rt)

    def read(name: str, *labels: str) -> float:
        samples = {sample.name: sample for sample in collector()}
        return samples[name].values.get(labels, -1.0)

    return read


def test_waiting_payments_are_counted_by_state_of_their_call(payready: InProcessSystem, exported: ReadMetric) -> None:
    """The oldest wait of each state is exported, too."""
    payready.initiate("pay_1", "acct_a")
    payready.drop_tasks()
    payready.clock.advance(1)
    payready.initiate("pay_2", "acct_b")
    payready.provider.script["acct_c"] = [CallResultUnknown("lost")]
    payready.initiate("pay_3", "acct_c")
    payready.run_tasks()
    payready.clock.advance(2)
    waiting = {
        state: exported("payready_waiting_payments", state) for state in ("none", "accepted", "uncertain", "calling")
    }
    assert waiting == {"none": 1, "accepted": 1, "uncertain": 1, "calling": 0}
    assert exported("payready_oldest_wait_seconds", "none") == 3
    assert exported("payready_oldest_wait_seconds", "uncertain") == 2
    assert exported("payready_past_deadline_seconds") == 0
    payready.clock.advance(130)
    assert exported("payready_past_deadline_seconds") == 13


def test_payment_that_waits_for_a_delayed_call_counts_once(payready: InProcessSystem, exported: ReadMetric) -> None:
    """Its account has two refreshes: one in flight, and a requested one."""
    payready.initiate("pay_1", "acct_a")
    payready.run_tasks()
    payready.clock.advance(5)
    payready.initiate("pay_2", "acct_a", max_balance_age_s=0)
    payready.run_tasks()
    assert payready.refreshes("acct_a") == ["accepted", "requested"]
    assert exported("payready_waiting_payments", "accepted") == 2
    assert exported("payready_waiting_payments", "requested") == 0


def test_unanswered_call_is_counted_apart_from_no_call(payready: InProcessSystem, exported: ReadMetric) -> None:
    """The refresh window ends before the payment's deadline: a call was made and charged."""
    payready.initiate("pay_1", "acct_a")
    payready.run_tasks()
    payready.pass_time(61)
    assert payready.refreshes("acct_a") == ["unanswered"]
    assert exported("payready_waiting_payments", "unanswered") == 1
    assert exported("payready_waiting_payments", "none") == 0


def test_outcomes_are_counted_by_the_hour_after_a_long_pause(payready: InProcessSystem, exported: ReadMetric) -> None:
    """One query over a long pause between scrapes would time out."""
    payready.initiate("pay_1", "acct_a")
    payready.run_tasks()
    payready.balance("acct_a")
    payready.run_tasks()
    payready.clock.advance(2 * 3600)
    payready.initiate("pay_2", "acct_b")
    payready.run_tasks()
    payready.balance("acct_b")
    payready.run_tasks()
    payready.clock.advance(WRITE_LAG.total_seconds())
    assert [exported("payready_outcomes_total", "released", "none") for _ in range(4)] == [1, 1, 2, 2]


def test_outcomes_and_fees_are_counted_once_after_the_write_lag(
    payready: InProcessSystem, exported: ReadMetric
) -> None:
    """Repeated scrapes change nothing. A call is pending until it is posted or void."""
    exported("payready_outcomes_total")
    payready.initiate("pay_1", "acct_a")
    payready.provider.script["acct_b"] = [CallResultUnknown("lost")]
    payready.initiate("pay_2", "acct_b")
    payready.run_tasks()
    payready.balance("acct_a")
    payready.run_tasks()
    assert exported("payready_outcomes_total", "released", "none") == 0, (
        "another transaction may still commit an earlier row"
    )
    payready.clock.advance(WRITE_LAG.total_seconds())
    for _ in range(2):
        assert exported("payready_outcomes_total", "released", "none") == 1
        assert exported("payready_fee_entries_total", "posted", "USD") == 1
        assert exported("payready_fees_total", "posted", "USD") == 0.1
    assert (exported("payready_pending_calls"), exported("payready_pending_fees", "USD")) == (1, 0.1)
    new_collector = LedgerCollector(payready.rt)
    assert {f.name: f.values for f in new_collector()}["payready_pending_calls"] == {(): 1}, (
        "a new collector counts it, too"
    )
    payready.balance("acct_b")
    payready.run_tasks()
    payready.clock.advance(WRITE_LAG.total_seconds())
    assert (exported("payready_pending_calls"), exported("payready_pending_fees", "USD")) == (0, 0)
    assert exported("payready_fees_total", "posted", "USD") == 0.2
    assert {f.name: f.values for f in new_collector()}["payready_pending_calls"] == {(): 0}


def test_undelivered_and_unapplied_are_exported_with_their_age(payready: InProcessSystem, exported: ReadMetric) -> None:
    """The age counts from the resolution, and from the balance's arrival."""
    payready.initiate("pay_1", "acct_a")
    payready.run_tasks()
    balance_id = payready.balance("acct_a", stored_only=True)
    payready.clock.advance(2)
    assert (exported("payready_unapplied_balances"), exported("payready_oldest_unapplied_seconds")) == (1, 2)
    payready.queue.balances_to_apply.clear()
    flow.apply_balance(payready.rt, balance_id)  # its follow-up is not dispatched
    payready.clock.advance(3)
    assert (exported("payready_undelivered_outcomes"), exported("payready_oldest_undelivered_seconds")) == (1, 3)
    payready.pass_time(10)
    assert (exported("payready_undelivered_outcomes"), exported("payready_unapplied_balances")) == (0, 0)


def test_balance_latency_is_observed_once(payready: InProcessSystem) -> None:
    """From the call to the arrival, and from there to the resolution. A repeated apply observes nothing."""
    before = [_sum_and_count(histogram) for histogram in (CALL_TO_BALANCE_SECONDS, BALANCE_TO_RESOLUTION_SECONDS)]
    payready.initiate("pay_1", "acct_a")
    payready.run_tasks()
    payready.clock.advance(7)
    balance_id = payready.balance("acct_a", stored_only=True)
    payready.clock.advance(2)
    payready.run_tasks()
    payready.queue.balances_to_apply.append(balance_id)
    payready.run_tasks()
    after = [_sum_and_count(histogram) for histogram in (CALL_TO_BALANCE_SECONDS, BALANCE_TO_RESOLUTION_SECONDS)]
    assert [(a[0] - b[0], a[1] - b[1]) for a, b in zip(after, before, strict=True)] == [(7, 1), (2, 1)]


def _sum_and_count(histogram: object) -> tuple[float, float]:
    samples = {s.name: s.value for metric in histogram.collect() for s in metric.samples}  # type: ignore[attr-defined]
    name = next(name.removesuffix("_sum") for name in samples if name.endswith("_sum"))
    return samples[f"{name}_sum"], samples[f"{name}_count"]


def test_collector_caches_values_and_reports_an_unavailable_source() -> None:
    """It omits the values of an unavailable source, because the cached ones are outdated."""
    now, queries = [0.0], [0]
    definition = MetricDefinition(name="payready_x", kind="gauge", help_text="X.", labels=(Label(name="kind"),))

    def query() -> list[MetricSample]:
        queries[0] += 1
        if queries[0] == 2:
            raise OSError("unavailable")
        return [definition.sample({("a",): 5})]

    def exported() -> dict[str, float]:
        return {sample.name: sample.value for family in collector.collect() for sample in family.samples}

    collector = CachedQueryCollector("database", query, clock=lambda: now[0])
    assert exported() == exported() == {"payready_database_up": 1, "payready_x": 5}
    assert queries == [1]
    now[0] += 5
    assert exported() == {"payready_database_up": 0}
    now[0] += 5
    assert exported() == {"payready_database_up": 1, "payready_x": 5}


def test_cap_usage_is_exported(payready: InProcessSystem) -> None:
    """Posted and pending calls count. A cap that is not set is not exported, and a cap of 0 is used up."""
    payready.rt.settings = payready.rt.settings.model_copy(
        update={"fee_cap_per_day": Decimal("0.4"), "fee_cap_per_month": Decimal(0)}
    )
    collector = LedgerCollector(payready.rt)

    def used() -> object:
        return {sample.name: sample.values for sample in collector()}["payready_fee_cap_used_ratio"]

    assert used() == {("day",): 0, ("month",): 1}
    payready.rt.settings = payready.rt.settings.model_copy(update={"fee_cap_per_month": None})
    payready.initiate("pay_1", "acct_a")
    payready.run_tasks()
    assert used() == {("day",): 0.25}


def test_circuit_breaker_metric_is_1_while_it_is_open(payready: InProcessSystem) -> None:
    """The used burst of the rate limiter is exported, too."""

    def exported() -> dict[str, float]:
        return {sample.name: sample.values[()] for sample in admission_metrics(payready.rt)}

    assert exported()["payready_circuit_breaker_open"] == exported()["payready_rate_limiter_burst_used_ratio"] == 0
    for _ in range(payready.rt.settings.circuit_breaker_failures):
        payready.rt.admission.apply_result_to_breaker_and_limiter("failed", payready.clock(), payready.clock())
    assert exported()["payready_circuit_breaker_open"] == 1
    payready.clock.advance(6)
    assert exported()["payready_circuit_breaker_open"] == 0


def test_expiring_value_is_nan_after_its_lifetime() -> None:
    """One worker checks at a time. The maximum over all workers must not be an old value."""
    now = [0.0]
    value = ExpiringValue(180, clock=lambda: now[0])
    assert math.isnan(value())
    value.set(2)
    now[0] = 179
    assert value() == 2
    now[0] = 180
    assert math.isnan(value())
