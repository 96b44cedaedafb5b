"""The decision what to do with due payments: a table of examples, without a database."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from worker.flow.check_decision import MAX_APPLY_DELAY, CheckInputs, CheckPlan, plan_expiry_polls_and_rejoins
from worker.ledger.balances import BalanceRecord
from worker.ledger.payments import WaitingPayment
from worker.ledger.refreshes import RefreshRecord
from worker.rules.job import Job
from worker.rules.states import RefreshState

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
LEAD = 10 * SECOND
A = "acct_1"
REFRESH = RefreshRecord(refresh_id="ref_1", account_id=A, state=RefreshState.ACCEPTED, call_count=1)


def payment(deadline: float, *, requested: float = -100, profile_id: str | None = "p_1") -> WaitingPayment:
    """Return a payment with this deadline and this time of its request, in seconds after `NOW`."""
    job = Job(payment_id="pay_1", account_id=A, profile_id=profile_id)
    return WaitingPayment(
        payment_id="pay_1",
        account_id=A,
        job=job,
        requested_at=NOW + requested * SECOND,
        min_balance_at=NOW + requested * SECOND,
        deadline=NOW + deadline * SECOND,
    )


@dataclass(frozen=True, kw_only=True)
class Example:
    """A payment, what is known of it, and what the plan does with it."""

    payment: WaitingPayment
    served: bool = True
    arrived: tuple[BalanceRecord, ...] = ()
    poll_lead: timedelta | None = LEAD
    actions: frozenset[str]
    next_check_s: float | None
    """Seconds after `NOW`. None if the payment is not checked again."""


def example(
    waiting: WaitingPayment, *actions: str, next_check_s: float | None = None, served: bool = True, **known: object
) -> Example:
    return Example(
        payment=waiting,
        served=served,
        actions=frozenset(actions),
        next_check_s=next_check_s,
        **known,  # type: ignore[arg-type]
    )


def balance(received: float, *, as_of: float | None = None, is_applied: bool = False) -> BalanceRecord:
    """Return a REFRESH balance that arrived this many seconds after `NOW`, and is as of then unless said."""
    at = NOW + (received if as_of is None else as_of) * SECOND
    return BalanceRecord(
        balance_id="bal_1",
        event_id="evt_1",
        account_id=A,
        at=at,
        as_of=at,
        source="REFRESH",
        available=None,
        current=None,
        limit=None,
        received_at=NOW + received * SECOND,
        due_at=None if is_applied else NOW,
    )


DELAY_S = MAX_APPLY_DELAY.total_seconds()
EXAMPLES = {
    "deadline reached": example(payment(0), "expire"),
    "deadline passed, without a refresh": example(payment(-3), "expire", served=False),
    "balance arrived in time": example(payment(0), "apply", next_check_s=1, arrived=(balance(-1),)),
    "balance arrived at the deadline": example(payment(0), "apply", next_check_s=1, arrived=(balance(0),)),
    "balance arrived after the deadline": example(payment(-1), "expire", arrived=(balance(-0.5),)),
    "balance is too old": example(payment(0), "expire", arrived=(balance(-1, as_of=-200),)),
    "applied balance may resolve a payment that was requested since": example(
        payment(0), "apply", next_check_s=1, arrived=(balance(-1, is_applied=True),)
    ),
    "balance is never applied": example(payment(-DELAY_S), "expire", arrived=(balance(-DELAY_S - 1),)),
    "balance arrived before the deadline, which is later": example(
        payment(20), next_check_s=10, arrived=(balance(-1),)
    ),
    "long before the poll": example(payment(60), next_check_s=50),
    "time of the poll": example(payment(10), "poll", next_check_s=1),
    "poll would be due before the next check": example(payment(11), "poll", next_check_s=1),
    "poll a moment after the next check": example(payment(11.5), next_check_s=1.5),
    "poll missed, for want of slots": example(payment(3), "poll", next_check_s=1),
    "too late for a poll": example(payment(0.5), next_check_s=0.5),
    "short timeout: poll in its last quarter": example(payment(8, requested=0), next_check_s=6),
    "without a profile": example(payment(10, profile_id=None), next_check_s=10),
    "without a profile, one second before the deadline": example(payment(1, profile_id=None), next_check_s=1),
    "polls disabled": example(payment(10), next_check_s=10, poll_lead=None),
    "without a refresh": example(payment(100, requested=-5), "rejoin", next_check_s=10, served=False),
    "without a refresh, poll before the next try": example(
        payment(30, requested=-30), "rejoin", next_check_s=20, served=False
    ),
    "without a refresh, at the time of its poll": example(payment(5), "rejoin", next_check_s=1, served=False),
}


def actions_of(plan: CheckPlan) -> set[str]:
    actions = {"expire": plan.expired, "apply": plan.balances_to_apply, "poll": plan.to_poll, "rejoin": plan.to_rejoin}
    return {name for name, chosen in actions.items() if chosen}


@pytest.mark.parametrize("case", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_plan_decides_on_a_payment(case: Example) -> None:
    inputs = CheckInputs(
        due=[case.payment],
        serving={"pay_1": REFRESH if case.served else None},
        arrived={A: case.arrived},
        clock_skew=5 * SECOND,
    )
    plan = plan_expiry_polls_and_rejoins(inputs, now=NOW, poll_lead=case.poll_lead)
    assert actions_of(plan) == case.actions
    expected = {} if case.next_check_s is None else {"pay_1": NOW + case.next_check_s * SECOND}
    assert plan.next_checks == expected
    if plan.balances_to_apply:
        assert plan.balances_to_apply == ["bal_1"]


def test_expired_payment_knows_the_balance_that_was_too_old() -> None:
    too_old = balance(-1, as_of=-200)
    inputs = CheckInputs(due=[payment(0)], serving={"pay_1": REFRESH}, arrived={A: [too_old]}, clock_skew=5 * SECOND)
    [expired] = plan_expiry_polls_and_rejoins(inputs, now=NOW, poll_lead=LEAD).expired
    assert expired.too_old == too_old
