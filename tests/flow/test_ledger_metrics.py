"""Metrics that are read from the ledger."""

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
    Label,
    MetricDefinition,
    MetricSample,
)
from worker.metrics_collector import CachedQueryCollector

Ask = Callable[..., float]


@pytest.fixture
def exported(payready: InProcessSystem) -> Ask:
    """Asks for one value, by the name of its metric and its labels, of a watch that began with the test."""
    watch = LedgerCollector(payready.rt)

    def ask(name: str, *labels: str) -> float:
        figures = {figure.name: figure for figure in watch()}
        return figures[name].values.get(labels, -1.0)

    return ask


def test_waiting_payments_are_counted_by_state_of_their_call(payready: InProcessSystem, exported: Ask) -> None:
    """With how long the first of each kind waits: one without a call, one called, one whose answer was lost."""
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


def test_payment_that_waits_for_a_delayed_call_counts_once(payready: InProcessSystem, exported: Ask) -> None:
    """Its account has two open refreshes: one in flight, one that is to follow it."""
    payready.initiate("pay_1", "acct_a")
    payready.run_tasks()
    payready.clock.advance(5)
    payready.initiate("pay_2", "acct_a", max_balance_age_s=0)
    payready.run_tasks()
    assert payready.refreshes("acct_a") == ["accepted", "requested"]
    assert exported("payready_waiting_payments", "accepted") == 2
    assert exported("payready_waiting_payments", "requested") == 0


def test_unanswered_call_is_counted_apart_from_no_call(payready: InProcessSystem, exported: Ask) -> None:
    """The window of its refresh is over before its deadline: a call was made, and charged."""
    payready.initiate("pay_1", "acct_a")
    payready.run_tasks()
    payready.pass_time(61)
    assert payready.refreshes("acct_a") == ["unanswered"]
    assert exported("payready_waiting_payments", "unanswered") == 1
    assert exported("payready_waiting_payments", "none") == 0


def test_outcomes_since_the_last_scrape_are_counted_in_steps(payready: InProcessSystem, exported: Ask) -> None:
    """Not all of it at once, or a long absence would make a question that is never answered in time."""
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


def test_outcomes_and_fees_are_counted_once_they_are_settled_for_good(payready: InProcessSystem, exported: Ask) -> None:
    """However often it is asked; and a call is open until it is posted or void."""
    exported("payready_outcomes_total")
    payready.initiate("pay_1", "acct_a")
    payready.provider.script["acct_b"] = [CallResultUnknown("lost")]
    payready.initiate("pay_2", "acct_b")
    payready.run_tasks()
    payready.balance("acct_a")
    payready.run_tasks()
    assert exported("payready_outcomes_total", "released", "none") == 0, (
        "not before the time in which others may commit"
    )
    payready.clock.advance(WRITE_LAG.total_seconds())
    for _ in range(2):
        assert exported("payready_outcomes_total", "released", "none") == 1
        assert exported("payready_fee_entries_total", "posted", "USD") == 1
        assert exported("payready_fees_total", "posted", "USD") == 0.1
    assert (exported("payready_pending_calls"), exported("payready_pending_fees", "USD")) == (1, 0.1)
    late = LedgerCollector(payready.rt)
    assert {f.name: f.values for f in late()}["payready_pending_calls"] == {(): 1}, "one that starts now finds it too"
    payready.balance("acct_b")
    payready.run_tasks()
    payready.clock.advance(WRITE_LAG.total_seconds())
    assert (exported("payready_pending_calls"), exported("payready_pending_fees", "USD")) == (0, 0)
    assert exported("payready_fees_total", "posted", "USD") == 0.2
    assert {f.name: f.values for f in late()}["payready_pending_calls"] == {(): 0}


def test_what_was_not_delivered_or_applied_shows_with_its_age(payready: InProcessSystem, exported: Ask) -> None:
    """Since it was settled, and since it came."""
    payready.initiate("pay_1", "acct_a")
    payready.run_tasks()
    balance_id = payready.balance("acct_a", later=True)
    payready.clock.advance(2)
    assert (exported("payready_unapplied_balances"), exported("payready_oldest_unapplied_seconds")) == (1, 2)
    payready.queue.balances_to_apply.clear()
    flow.apply_balance(payready.rt, balance_id)  # its follow-up is not dispatched
    payready.clock.advance(3)
    assert (exported("payready_undelivered_outcomes"), exported("payready_oldest_undelivered_seconds")) == (1, 3)
    payready.pass_time(10)
    assert (exported("payready_undelivered_outcomes"), exported("payready_unapplied_balances")) == (0, 0)


def test_the_way_of_a_balance_is_timed(payready: InProcessSystem) -> None:
    """From the call to its arrival, from there to the settlement; applying it again times nothing."""
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


def test_collector_caches_values_and_reports_an_unavailable_source() -> None:
    """Figures of someone who does not answer are left out: old ones would lie."""
    now, asked = [0.0], [0]
    example = MetricDefinition(name="payready_x", kind="gauge", help_text="X.", labels=(Label(name="kind"),))

    def ask() -> list[MetricSample]:
        asked[0] += 1
        if asked[0] == 2:
            raise OSError("away")
        return [example.sample({("a",): 5})]

    def exported() -> dict[str, float]:
        return {sample.name: sample.value for family in collector.collect() for sample in family.samples}

    collector = CachedQueryCollector("database", ask, clock=lambda: now[0])
    assert exported() == exported() == {"payready_database_up": 1, "payready_x": 5}
    assert asked == [1]
    now[0] += 5
    assert exported() == {"payready_database_up": 0}
    now[0] += 5
    assert exported() == {"payready_database_up": 1, "payready_x": 5}


def test_cap_usage_is_exported(payready: InProcessSystem) -> None:
    """Posted and pending calls count. A cap that is not set is not exported, and a cap of 0 is used up."""
    payready.rt.settings = payready.rt.settings.model_copy(
        update={"fee_cap_per_day": Decimal("0.4"), "fee_cap_per_month": Decimal(0)}
    )
    watch = LedgerCollector(payready.rt)

    def used() -> object:
        return {figure.name: figure.values for figure in watch()}["payready_fee_cap_used_ratio"]

    assert used() == {("day",): 0, ("month",): 1}
    payready.rt.settings = payready.rt.settings.model_copy(update={"fee_cap_per_month": None})
    payready.initiate("pay_1", "acct_a")
    payready.run_tasks()
    assert used() == {("day",): 0.25}


def test_circuit_breaker_metric_is_1_while_it_is_open(payready: InProcessSystem) -> None:
    """And the budget as far as it is spent."""

    def exported() -> dict[str, float]:
        return {figure.name: figure.values[()] for figure in redis_metrics(payready.rt)}

    assert exported()["payready_circuit_breaker_open"] == exported()["payready_rate_limiter_burst_used_ratio"] == 0
    for _ in range(payready.rt.settings.circuit_breaker_failures):
        payready.rt.admission.apply_result_to_breaker_and_limiter("failed", payready.clock(), payready.clock())
    assert exported()["payready_circuit_breaker_open"] == 1
    payready.clock.advance(6)
    assert exported()["payready_circuit_breaker_open"] == 0


def test_what_one_process_found_is_forgotten_for_what_another_may_have_found_since() -> None:
    """Of several workers only one checks at a time: the greatest of their values must not be an old one."""
    now = [0.0]
    flaws = ExpiringValue(180, clock=lambda: now[0])
    assert math.isnan(flaws())
    flaws.set(2)
    now[0] = 179
    assert flaws() == 2
    now[0] = 180
    assert math.isnan(flaws())
