"""Correlation store: sharers and leaders of a call, on a fake Redis and on a real server."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from redis import Redis

from tests.support.in_process import START
from worker.correlation.redis_client import REDIS_UNAVAILABLE, create_client
from worker.correlation.store import (
    ACCOUNT_TTL_S,
    AccountState,
    CalledRefresh,
    CorrelationStore,
    JoinRequest,
    JoinResult,
    NewRefreshBalance,
)

A = "acct_12Hz9Dz7vEAuljYvhmPcvM9"
SKEW = timedelta(seconds=5)


def at(seconds: float) -> datetime:
    """Return the time this many seconds after the start."""
    return START + timedelta(seconds=seconds)


@pytest.fixture
def store(redis: "Redis") -> CorrelationStore:
    """Create a store on `redis`."""
    return CorrelationStore(redis)


def called(refresh_id: str, seconds: float) -> CalledRefresh:
    """Return a refresh of the account that is called at this time."""
    return CalledRefresh(account_id=A, refresh_id=refresh_id, called_at=at(seconds))


def new_balance(balance_id: str, seconds: float) -> NewRefreshBalance:
    """Return a balance of the account at this time."""
    return NewRefreshBalance(account_id=A, balance_id=balance_id, at=at(seconds))


def join(
    store: CorrelationStore, lead: str, *, requested_at: float = 0, age: float | None = 30, account: str = A
) -> JoinResult:
    """Join as a payment requested at this time with this maximum balance age; None requires an own call."""
    oldest = at(requested_at - (age or 0))
    request = JoinRequest(
        account_id=account,
        refresh_id=lead,
        min_balance_at=None if age is None else oldest - SKEW,
        min_called_at=oldest,
    )
    [result] = store.reuse_balance_or_join_refresh([request])
    return result


def test_first_payment_leads_and_later_payments_join(store: CorrelationStore) -> None:
    """A call that is not sent yet serves every maximum balance age."""
    assert join(store, "r1") == JoinResult(kind="leader", id="r1")
    assert join(store, "r2") == JoinResult(kind="joined", id="r1")
    assert join(store, "r3", age=None) == JoinResult(kind="joined", id="r1")


def test_join_is_idempotent(store: CorrelationStore, redis: "Redis") -> None:
    """The leader leads again, and a joined payment joins again."""
    join(store, "r1")
    before = redis.hgetall(redis.keys()[0])
    assert join(store, "r1") == JoinResult(kind="leader", id="r1")
    assert join(store, "r2") == JoinResult(kind="joined", id="r1")
    assert redis.hgetall(redis.keys()[0]) == before


def test_accounts_have_nothing_to_do_with_each_other(store: CorrelationStore) -> None:
    """A leader for each."""
    join(store, "r1")
    assert join(store, "r2", account="acct_other") == JoinResult(kind="leader", id="r2")


def test_payment_joins_a_call_that_is_late_enough(store: CorrelationStore) -> None:
    """The boundary is inclusive. A payment that needs a later call leads the next one."""
    join(store, "r1")
    store.move_requested_to_in_flight([called("r1", 1)])
    assert join(store, "r2", requested_at=31) == JoinResult(kind="joined", id="r1")
    assert join(store, "r3", requested_at=31.000001) == JoinResult(kind="leader", id="r3")
    assert join(store, "r4", requested_at=1.5, age=None) == JoinResult(kind="joined", id="r3")
    assert join(store, "r5", requested_at=20) == JoinResult(kind="joined", id="r1")


def test_stored_balance_serves_payments_that_allow_its_age(store: CorrelationStore) -> None:
    """The limit includes the clock skew. A payment that requires an own call is not served."""
    store.add_balances_and_clear_answered_refreshes([new_balance("b1", 0)], SKEW)
    assert join(store, "r1", requested_at=35) == JoinResult(kind="balance", id="b1")
    assert join(store, "r2", requested_at=1, age=None) == JoinResult(kind="leader", id="r2")
    assert join(store, "r3", requested_at=35.000001) == JoinResult(kind="joined", id="r2")


def test_store_keeps_the_newest_balance(store: CorrelationStore) -> None:
    """Balances arrive in any order."""
    store.add_balances_and_clear_answered_refreshes([new_balance("b2", 2)], SKEW)
    store.add_balances_and_clear_answered_refreshes([new_balance("b1", 1)], SKEW)
    assert join(store, "r1", requested_at=3) == JoinResult(kind="balance", id="b2")


def test_balance_ends_the_in_flight_refresh_that_it_can_answer(store: CorrelationStore) -> None:
    """The balance is not older than the call minus the clock skew. An older balance leaves the refresh in flight."""
    join(store, "r1")
    store.move_requested_to_in_flight([called("r1", 10)])
    store.add_balances_and_clear_answered_refreshes([new_balance("b0", 4.9)], SKEW)
    assert join(store, "r2", requested_at=41) == JoinResult(kind="leader", id="r2")
    assert join(store, "r3", requested_at=10, age=None) == JoinResult(kind="joined", id="r1")
    store.add_balances_and_clear_answered_refreshes([new_balance("b1", 5)], SKEW)
    assert join(store, "r4", requested_at=10, age=None) == JoinResult(kind="joined", id="r2")


def test_cleared_refresh_serves_no_payment(store: CorrelationStore) -> None:
    """It may be in flight or requested. Clearing another refresh changes nothing."""
    join(store, "r1")
    store.clear_requested_or_in_flight_refresh(A, "r9")
    assert join(store, "r2") == JoinResult(kind="joined", id="r1")
    store.clear_requested_or_in_flight_refresh(A, "r1")
    assert join(store, "r2") == JoinResult(kind="leader", id="r2")
    store.move_requested_to_in_flight([called("r2", 0)])
    store.clear_requested_or_in_flight_refresh(A, "r2")
    assert join(store, "r3") == JoinResult(kind="leader", id="r3")


def test_mark_called_keeps_another_requested_refresh(store: CorrelationStore) -> None:
    """Only the called refresh stops being the requested one."""
    join(store, "r1")
    store.move_requested_to_in_flight([called("r0", 0)])
    assert join(store, "r2", requested_at=40) == JoinResult(kind="joined", id="r1")


def test_restore_replaces_the_stored_account_state(store: CorrelationStore) -> None:
    """A balance that the ledger lacks was never committed."""
    store.add_balances_and_clear_answered_refreshes([new_balance("b1", 0)], SKEW)
    join(store, "r1", age=None)
    state = AccountState(in_flight="r7", called_at=at(100), requested="r8", newest_balance=new_balance("b2", 0))
    store.restore_account(A, state)
    assert join(store, "r9", requested_at=110) == JoinResult(kind="joined", id="r7")
    assert join(store, "r9", requested_at=131) == JoinResult(kind="joined", id="r8")
    assert join(store, "r9", requested_at=10) == JoinResult(kind="balance", id="b2")
    store.restore_account(A, AccountState())
    assert join(store, "r9", requested_at=131) == JoinResult(kind="leader", id="r9")


def test_keys_have_a_hash_tag_and_a_time_to_live(store: CorrelationStore, redis: "Redis") -> None:
    """The account in braces puts a key on one cluster node. Each script sets the time to live."""
    writers: list[Callable[[], object]] = [
        lambda: join(store, "r1"),
        lambda: store.move_requested_to_in_flight([called("r1", 0)]),
        lambda: store.add_balances_and_clear_answered_refreshes([new_balance("b1", 0)], SKEW),
        lambda: store.restore_account(A, AccountState(in_flight="r1", called_at=at(0), requested="r2")),
    ]
    for write in writers:
        redis.flushall()
        write()
        assert redis.keys() == [f"payready:{{{A}}}"]
        assert ACCOUNT_TTL_S - 5 <= redis.ttl(redis.keys()[0]) <= ACCOUNT_TTL_S


def test_ledgers_with_equal_account_ids_share_no_key(redis: "Redis") -> None:
    """With a shared key the second payment would join a refresh that is in another ledger."""
    stores = [CorrelationStore(redis, key_prefix=prefix) for prefix in ("", "live.", "test.")]
    for store in stores:
        assert join(store, "r1").kind == "leader"
        store.move_requested_to_in_flight([called("r1", 0)])
        store.add_balances_and_clear_answered_refreshes([new_balance("b1", 0)], SKEW)
    assert sorted(redis.keys()) == [f"live.payready:{{{A}}}", f"payready:{{{A}}}", f"test.payready:{{{A}}}"]


def test_clear_and_restore_of_nothing_create_no_key(store: CorrelationStore, redis: "Redis") -> None:
    """A key without a time to live would stay for ever."""
    store.clear_requested_or_in_flight_refresh(A, "r1")
    store.restore_account(A, AccountState())
    assert redis.keys() == []


def test_store_reloads_scripts_after_a_script_flush(store: CorrelationStore, redis: "Redis") -> None:
    """A failover also loses the scripts."""
    join(store, "r1")
    redis.script_flush()
    assert join(store, "r2") == JoinResult(kind="joined", id="r1")


def test_unavailable_redis_raises_redis_unavailable() -> None:
    """Callers handle this error."""
    store = CorrelationStore(create_client("redis://127.0.0.1:1/0"))
    with pytest.raises(REDIS_UNAVAILABLE):
        join(store, "r1")
    store._redis.close()


seconds = st.integers(0, 20)
refresh_ids = st.sampled_from(["r1", "r2", "r3"])


class ModelComparisonMachine(RuleBasedStateMachine):
    """State machine that compares the Lua scripts with a Python model."""

    redis: ClassVar["Redis"]

    def __init__(self) -> None:
        super().__init__()
        self.store = CorrelationStore(self.redis)
        self.in_flight: tuple[str, int] | None = None
        self.next: str | None = None
        self.balance: tuple[str, int] | None = None
        self.balances = 0

    @initialize()
    def flush(self) -> None:
        """Start empty."""
        self.store._redis.flushall()

    @rule(lead=refresh_ids, requested_at=seconds, age=st.none() | st.integers(0, 10))
    def join(self, lead: str, requested_at: int, age: int | None) -> None:
        """Join as a payment."""
        oldest = requested_at - (age or 0)
        if age is not None and self.balance is not None and self.balance[1] >= oldest - 5:
            expected = JoinResult(kind="balance", id=self.balance[0])
        elif self.in_flight is not None and self.in_flight[1] >= oldest:
            expected = JoinResult(kind="joined", id=self.in_flight[0])
        elif self.next is not None and self.next != lead:
            expected = JoinResult(kind="joined", id=self.next)
        else:
            expected, self.next = JoinResult(kind="leader", id=lead), lead
        assert join(self.store, lead, requested_at=requested_at, age=age) == expected

    @rule(refresh_id=refresh_ids, now=seconds)
    def send_call(self, refresh_id: str, now: int) -> None:
        """Send a call."""
        self.store.move_requested_to_in_flight([called(refresh_id, now)])
        self.in_flight = (refresh_id, now)
        self.next = None if self.next == refresh_id else self.next

    @rule(when=seconds)
    def add_balance(self, when: int) -> None:
        """Add a balance."""
        self.balances += 1
        self.store.add_balances_and_clear_answered_refreshes([new_balance(f"b{self.balances}", when)], SKEW)
        if self.balance is None or when >= self.balance[1]:
            self.balance = (f"b{self.balances}", when)
        if self.in_flight is not None and when >= self.in_flight[1] - 5:
            self.in_flight = None

    @rule(refresh_id=refresh_ids)
    def clear(self, refresh_id: str) -> None:
        """Clear a refresh."""
        self.store.clear_requested_or_in_flight_refresh(A, refresh_id)
        self.in_flight = None if self.in_flight and self.in_flight[0] == refresh_id else self.in_flight
        self.next = None if self.next == refresh_id else self.next

    @rule(
        in_flight=st.none() | st.tuples(refresh_ids, seconds),
        requested=st.none() | refresh_ids,
        balance=st.none() | st.tuples(st.just("b0"), seconds),
    )
    def restore(
        self, in_flight: tuple[str, int] | None, requested: str | None, balance: tuple[str, int] | None
    ) -> None:
        """Restore the state from the ledger."""
        refresh_id, called_at = (in_flight[0], at(in_flight[1])) if in_flight else (None, None)
        newest = new_balance(*balance) if balance else None
        state = AccountState(in_flight=refresh_id, called_at=called_at, requested=requested, newest_balance=newest)
        self.store.restore_account(A, state)
        self.in_flight, self.next, self.balance = in_flight, requested, balance


def test_store_matches_the_model(redis: "Redis") -> None:
    """Operations run in any order."""
    ModelComparisonMachine.redis = redis
    run_state_machine_as_test(
        ModelComparisonMachine,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
