"""Ledger and Redis metrics as Prometheus scrapes them."""

import math
from collections.abc import Callable
from decimal import Decimal

import pytest

from tests.support.in_process import InProcessSystem
from worker import flow
from worker.errors import CallResultUnknown
from worker.ledger_metrics import WRITE_LAG, LedgerCollector, redis_metrics
from worker.metrics import (
    BALANCE_TO_RESOLUTION_SECONDS,
    CALL_TO_BALANCE_SECONDS,
    ExpiringValue,
    MetricSample,
    PolledCollector,
)

Sample = Callable[..., float]


@pytest.fixture
def sample(payready: InProcessSystem) -> Sample:
    """Return a function that reads one value by metric name and labels, from a collector created with the test."""
    collector = LedgerCollector(payready.rt)

    def read_sample(name: str, *labels: str) -> float:
        samples = {sample.name: sample for sample in collector()}
        return samples[name].values.get(labels, -1.0)

    return read_sample


def test_waiting_payments_are_counted_by_refresh_state(payready: InProcessSystem, sample: Sample) -> None:
    """The oldest wait is measured per state: no refresh, accepted, uncertain."""
    payready.initiate("pay_1", "acct_a")
    payready.drop_tasks()
    payready.clock.advance(1)
    payready.initiate("pay_2", "acct_b")
    payready.provider.script["acct_c"] = [CallResultUnknown("lost")]
    payready.initiate("pay_3", "acct_c")
    payready.run_tasks()
    payready.clock.advance(2)
    waiting = {
        state: sample("payready_waiting_payments", state) for state in ("none", "accepted", "uncertain", "calling")
    }
    assert waiting == {"none": 1, "accepted": 1, "uncertain": 1, "calling": 0}
    assert sample("payready_oldest_wait_seconds", "none") == 3
    assert sample("payready_oldest_wait_seconds", "uncertain") == 2
    assert sample("payready_past_deadline_seconds") == 0
    payready.clock.advance(130)
    assert sample("payready_past_deadline_seconds") == 13


def test_waiting_payment_with_two_active_refreshes_counts_once(payready: InProcessSystem, sample: Sample) -> None:
    """The account has one refresh in flight and one queued behind it."""
    payready.initiate("pay_1", "acct_a")
    payready.run_tasks()
    payready.clock.advance(5)
    payready.initiate("pay_2", "acct_a", max_balance_age_s=0)
    payready.run_tasks()
    assert payready.refreshes("acct_a") == ["accepted", "requested"]
    assert sample("payready_waiting_payments", "accepted") == 2
    assert sample("payready_waiting_payments", "requested") == 0


def test_waiting_payment_of_an_unanswered_refresh_has_its_own_state(payready: InProcessSystem, sample: Sample) -> None:
    """The refresh window ends before the deadline: a call was made and billed."""
    payready.initiate("pay_1", "acct_a")
    payready.run_tasks()
    payready.pass_time(61)
    assert payready.refreshes("acct_a") == ["unanswered"]
    assert sample("payready_waiting_payments", "unanswered") == 1
    assert sample("payready_waiting_payments", "none") == 0


def test_collector_catches_up_in_steps_after_a_pause(payready: InProcessSystem, sample: Sample) -> None:
    """One query over a long pause would exceed its timeout."""
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
    assert [sample("payready_outcomes_total", "released", "none") for _ in range(4)] == [1, 1, 2, 2]


def test_collector_counts_each_outcome_and_fee_entry_once(payready: InProcessSystem, sample: Sample) -> None:
    """The number of scrapes does not matter. A call is unresolved until it is posted or void."""
    sample("payready_outcomes_total")
    payready.initiate("pay_1", "acct_a")
    payready.provider.script["acct_b"] = [CallResultUnknown("lost")]
    payready.initiate("pay_2", "acct_b")
    payready.run_tasks()
    payready.balance("acct_a")
    payready.run_tasks()
    assert sample("payready_outcomes_total", "released", "none") == 0, (
        "not before WRITE_LAG, in which other transactions may commit"
    )
    payready.clock.advance(WRITE_LAG.total_seconds())
    for _ in range(2):
        assert sample("payready_outcomes_total", "released", "none") == 1
        assert sample("payready_fee_entries_total", "posted", "USD") == 1
        assert sample("payready_fees_total", "posted", "USD") == 0.1
    assert (sample("payready_unresolved_calls"), sample("payready_unresolved_fees", "USD")) == (1, 0.1)
    late = LedgerCollector(payready.rt)
    assert {f.name: f.values for f in late()}["payready_unresolved_calls"] == {(): 1}, (
        "a collector that starts now also counts it"
    )
    payready.balance("acct_b")
    payready.run_tasks()
    payready.clock.advance(WRITE_LAG.total_seconds())
    assert (sample("payready_unresolved_calls"), sample("payready_unresolved_fees", "USD")) == (0, 0)
    assert sample("payready_fees_total", "posted", "USD") == 0.2
    assert {f.name: f.values for f in late()}["payready_unresolved_calls"] == {(): 0}


def test_undelivered_outcomes_and_unapplied_balances_have_an_age(payready: InProcessSystem, sample: Sample) -> None:
    """The age starts at the resolution, and at the arrival of the balance."""
    payready.initiate("pay_1", "acct_a")
    payready.run_tasks()
    balance_id = payready.balance("acct_a", later=True)
    payready.clock.advance(2)
    assert (sample("payready_unapplied_balances"), sample("payready_oldest_unapplied_seconds")) == (1, 2)
    payready.queue.balances_to_apply.clear()
    flow.apply_balance(payready.rt, balance_id)  # its follow-up is lost
    payready.clock.advance(3)
    assert (sample("payready_undelivered_outcomes"), sample("payready_oldest_undelivered_seconds")) == (1, 3)
    payready.pass_time(10)
    assert (sample("payready_undelivered_outcomes"), sample("payready_unapplied_balances")) == (0, 0)


def test_balance_latency_is_observed_once(payready: InProcessSystem) -> None:
    """The histograms measure call to balance, and balance to resolution. A repeated apply adds no sample."""
    before = [_sum_and_count(histogram) for histogram in (CALL_TO_BALANCE_SECONDS, BALANCE_TO_RESOLUTION_SECONDS)]
    payready.initiate("pay_1", "acct_a")
    payready.run_tasks()
    payready.clock.advance(7)
    balance_id = payready.balance("acct_a", later=True)
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


def test_polled_collector_caches_values_and_reports_unavailability() -> None:
    """Values of an unavailable source are omitted, because they would be outdated."""
    now, query_count = [0.0], [0]

    def query() -> list[MetricSample]:
        query_count[0] += 1
        if query_count[0] == 2:
            raise OSError("unavailable")
        return [MetricSample("payready_x", "X.", {("a",): 5}, ("kind",))]

    def scrape() -> dict[str, float]:
        return {sample.name: sample.value for family in collector.collect() for sample in family.samples}

    collector = PolledCollector("database", query, clock=lambda: now[0])
    assert scrape() == scrape() == {"payready_database_up": 1, "payready_x": 5}
    assert query_count == [1]
    now[0] += 5
    assert scrape() == {"payready_database_up": 0}
    now[0] += 5
    assert scrape() == {"payready_database_up": 1, "payready_x": 5}


def test_fee_cap_metric_is_the_used_ratio(payready: InProcessSystem) -> None:
    """Posted and pending calls count. An unset cap has no sample, and a cap of zero is fully used."""
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
    """The rate limiter metric is the used share of the burst."""

    def scrape() -> dict[str, float]:
        return {sample.name: sample.values[()] for sample in redis_metrics(payready.rt)}

    assert scrape()["payready_circuit_breaker_open"] == scrape()["payready_rate_limiter_burst_used_ratio"] == 0
    for _ in range(payready.rt.settings.circuit_breaker_failures):
        payready.rt.admission.record_result("failed", payready.clock(), payready.clock())
    assert scrape()["payready_circuit_breaker_open"] == 1
    payready.clock.advance(6)
    assert scrape()["payready_circuit_breaker_open"] == 0


def test_expiring_value_becomes_nan() -> None:
    """One of several workers checks at a time, so the maximum of their values must not include an old one."""
    now = [0.0]
    flaws = ExpiringValue(180, clock=lambda: now[0])
    assert math.isnan(flaws())
    flaws.set(2)
    now[0] = 179
    assert flaws() == 2
    now[0] = 180
    assert math.isnan(flaws())
