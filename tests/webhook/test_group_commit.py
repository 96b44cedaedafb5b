"""Group commit: concurrent deliveries share a transaction, and a failing one does not affect the others."""

import asyncio
from collections.abc import Callable, Sequence
from threading import Event, get_ident
from typing import Any

import pytest

from tests.support.simulator import eventually
from webhook import group_commit as module
from webhook.events import ParsedDelivery
from webhook.group_commit import MAX_BATCH_SIZE, MAX_CONCURRENT_COMMITS, GroupCommitter


def deliveries(count: int) -> list[ParsedDelivery]:
    """Return deliveries that differ in their number of events."""
    return [ParsedDelivery(event_count=number) for number in range(count)]


def new_committer(
    commit: Callable[[Sequence[ParsedDelivery]], Any],
    on_committed: Callable[[Sequence[Any]], None] = lambda _: None,
    *,
    unavailable_errors: tuple[type[BaseException], ...] = (),
    is_available: Callable[[], bool] = lambda: False,
) -> GroupCommitter:
    """Return a committer. Its follow-ups are whatever `commit` returns."""
    return GroupCommitter(commit, on_committed, unavailable_errors=unavailable_errors, is_available=is_available)


async def _commit_all(
    committer: GroupCommitter, deliveries: Sequence[ParsedDelivery], proceed: Event
) -> list[BaseException | None]:
    """Commit deliveries concurrently: all are pending before `proceed` is set. Return the error of each, or None."""
    tasks = [asyncio.create_task(committer.commit(delivery)) for delivery in deliveries]
    await asyncio.sleep(0.05)
    proceed.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_concurrent_deliveries_share_transactions() -> None:
    """Each is committed once, in order of arrival, in batches of at most `MAX_BATCH_SIZE`."""
    proceed, committed = Event(), []

    def commit(batch: Sequence[ParsedDelivery]) -> None:
        proceed.wait(5)
        committed.append([delivery.event_count for delivery in batch])

    assert set(asyncio.run(_commit_all(new_committer(commit), deliveries(250), proceed))) == {None}
    assert sorted(number for batch in committed for number in batch) == list(range(250))
    assert all(batch == sorted(batch) for batch in committed)
    assert len(committed) < 10
    assert max(map(len, committed)) <= MAX_BATCH_SIZE


def test_unstorable_delivery_fails_alone() -> None:
    proceed = Event()
    proceed.set()

    def commit(batch: Sequence[ParsedDelivery]) -> None:
        if any(delivery.event_count == 7 for delivery in batch):
            raise KeyError

    errors = asyncio.run(_commit_all(new_committer(commit), deliveries(20), proceed))
    assert [number for number, error in enumerate(errors) if isinstance(error, KeyError)] == [7]
    assert errors.count(None) == 19


def test_unavailable_database_fails_the_batch_without_bisecting() -> None:
    """All deliveries get the error. The next delivery is committed anew."""
    proceed, batch_sizes = Event(), []

    def commit(batch: Sequence[ParsedDelivery]) -> None:
        proceed.wait(5)
        batch_sizes.append(len(batch))
        raise ConnectionError

    committer = new_committer(commit, unavailable_errors=(ConnectionError,))
    errors = asyncio.run(_commit_all(committer, deliveries(50), proceed))
    assert {type(error) for error in errors} == {ConnectionError}
    assert len(batch_sizes) <= 4
    with pytest.raises(ConnectionError):
        asyncio.run(committer.commit(ParsedDelivery()))


def test_unavailable_error_of_an_available_database_is_bisected() -> None:
    """Databases raise some errors both for bad values and for outages. A check of availability distinguishes them."""
    proceed, committed = Event(), list[ParsedDelivery]()
    proceed.set()

    def commit(batch: Sequence[ParsedDelivery]) -> None:
        if any(delivery.event_count == 7 for delivery in batch):
            raise ConnectionError
        committed.extend(batch)

    errors = asyncio.run(
        _commit_all(
            new_committer(commit, unavailable_errors=(ConnectionError,), is_available=lambda: True),
            deliveries(100),
            proceed,
        )
    )
    assert [number for number, error in enumerate(errors) if error] == [7]
    assert len(committed) == 99


def test_unstorable_event_does_not_affect_its_delivery() -> None:
    """The delivery fails and is sent again. Its other events are committed."""
    committed: list[Any] = []

    def commit(batch: Sequence[ParsedDelivery]) -> None:
        found: list[Any] = [
            event
            for delivery in batch
            for event in (*delivery.balances, *delivery.unparsed, *delivery.connection_updates)
        ]
        if "poison" in found:
            raise KeyError
        committed.extend(found)

    contents: Any = {"balances": ["a", "poison", "b"], "unparsed": ["c"], "connection_updates": ["d"]}
    delivery = ParsedDelivery(event_count=6, **contents)
    with pytest.raises(KeyError):
        asyncio.run(new_committer(commit).commit(delivery))
    assert sorted(committed) == ["a", "b", "c", "d"]


def test_transient_error_does_not_fail_the_delivery() -> None:
    """A serialization error, for instance."""
    batch_sizes: list[int] = []

    def commit(batch: Sequence[ParsedDelivery]) -> None:
        batch_sizes.append(len(batch))
        if len(batch_sizes) == 1:
            raise KeyError

    delivery: Any = ParsedDelivery(event_count=2, balances=["a", "b"])  # type: ignore[list-item]
    asyncio.run(new_committer(commit).commit(delivery))
    assert batch_sizes == [1, 1, 1]


def test_bisecting_stops_after_its_time_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider has timed out by then."""
    monkeypatch.setattr(module, "BISECT_TIME_BUDGET_S", -1)
    proceed, batch_sizes = Event(), []
    proceed.set()

    def commit(batch: Sequence[ParsedDelivery]) -> None:
        batch_sizes.append(len(batch))
        raise KeyError

    errors = asyncio.run(_commit_all(new_committer(commit), deliveries(50), proceed))
    assert {type(error) for error in errors} == {KeyError}
    assert len(batch_sizes) <= 4


def test_error_of_the_availability_check_fails_the_batch() -> None:

    def commit(_: Sequence[ParsedDelivery]) -> None:
        raise ConnectionError

    def is_available() -> bool:
        raise ValueError

    with pytest.raises(ValueError):
        asyncio.run(
            new_committer(commit, unavailable_errors=(ConnectionError,), is_available=is_available).commit(
                ParsedDelivery()
            )
        )


def test_panic_of_a_library_fails_its_delivery_and_costs_no_committer() -> None:
    """Libraries in Rust raise panics, which are no `Exception`."""

    class Panic(BaseException):
        pass

    def commit(batch: Sequence[ParsedDelivery]) -> None:
        if batch[0].event_count < MAX_CONCURRENT_COMMITS:
            raise Panic

    async def run() -> list[str]:
        committer = new_committer(commit)
        errors = []
        for delivery in deliveries(MAX_CONCURRENT_COMMITS + 1):
            try:
                await committer.commit(delivery)
            except RuntimeError as error:
                errors.append(str(error))
        return errors

    errors = asyncio.run(asyncio.wait_for(run(), 5))
    assert errors == ["the commit ended with Panic"] * MAX_CONCURRENT_COMMITS


def test_commit_does_not_wait_for_follow_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow-ups that fail or are slow do not delay commits. Later ones run in one batch, up to a limit."""
    monkeypatch.setattr(module, "FOLLOW_UP_CAPACITY", 30)
    followed: list[list[int]] = []
    started, proceed = Event(), Event()

    def on_committed(values: Sequence[int]) -> None:
        followed.append(list(values))
        started.set()
        proceed.wait(5)
        raise ConnectionError

    async def run() -> None:
        committer = new_committer(lambda batch: batch[0].event_count, on_committed)
        for delivery in deliveries(50):
            await committer.commit(delivery)
            assert started.wait(5)
        assert not proceed.is_set()
        proceed.set()
        committer.shut_down_after_follow_ups()

    asyncio.run(asyncio.wait_for(run(), 10))
    numbers = [number for values in followed for number in values]
    assert len(set(numbers)) == len(numbers)
    assert len(followed[1]) == 30
    assert len(numbers) < 50, "no follow-up was dropped"


def test_follow_up_of_a_delivery_that_comes_alone_needs_no_other_thread() -> None:
    threads: list[int] = []
    committer = new_committer(lambda _: threads.append(get_ident()), lambda _: threads.append(get_ident()))
    asyncio.run(committer.commit(ParsedDelivery()))
    committer.shut_down_after_follow_ups()
    committing, following = threads
    assert committing == following


def test_shutdown_runs_pending_follow_ups() -> None:
    """Without it the sweep would deliver the outcomes much later."""
    followed: list[int] = []
    committer = new_committer(len, followed.extend)
    asyncio.run(committer.commit(ParsedDelivery()))
    committer.shut_down_after_follow_ups()
    assert followed == [1]


def test_commit_during_shutdown_runs_its_follow_up() -> None:
    """The pool accepts no work any more, so the committing thread runs the follow-up."""
    followed: list[int] = []
    committing, proceed = Event(), Event()

    def commit(batch: Sequence[ParsedDelivery]) -> int:
        committing.set()
        proceed.wait(5)
        return len(batch)

    async def run() -> None:
        delivery = asyncio.create_task(committer.commit(ParsedDelivery()))
        await asyncio.to_thread(committing.wait, 5)
        shut_down = asyncio.create_task(asyncio.to_thread(committer.shut_down_after_follow_ups))
        await asyncio.to_thread(eventually, lambda: committer._threads._shutdown)
        proceed.set()
        await asyncio.gather(delivery, shut_down)

    committer = new_committer(commit, followed.extend)
    asyncio.run(asyncio.wait_for(run(), 10))
    assert followed == [1]
