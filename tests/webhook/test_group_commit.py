"""Deliveries that come at once are made safe at once, and none suffers by another."""

import asyncio
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

import pytest

from simulator.testing import eventually
from webhook import group_commit as module
from webhook.events import ParsedDelivery
from webhook.group_commit import MAX_BATCH_SIZE, GroupCommitter


def deliveries(count: int) -> list[ParsedDelivery]:
    """Deliveries that can be told apart."""
    return [ParsedDelivery(events=number) for number in range(count)]


def keeper(keep: Callable[[Sequence[ParsedDelivery]], Any], **how: Any) -> GroupCommitter[Any]:
    """One that follows nothing up."""
    return GroupCommitter(keep, lambda _: None, **how)


async def _keep(keeper: GroupCommitter[Any], given: Sequence[ParsedDelivery], go: Event) -> list[BaseException | None]:
    """Have them kept while the first ones wait for `go`; what each was told."""
    tasks = [asyncio.create_task(keeper.commit(delivery)) for delivery in given]
    await asyncio.sleep(0.05)
    go.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_what_comes_while_others_are_kept_is_kept_together() -> None:
    """Each once, in the order in which they came, not more than so many at a time."""
    go, kept = Event(), []

    def keep(taken: Sequence[ParsedDelivery]) -> None:
        go.wait(5)
        kept.append([delivery.events for delivery in taken])

    assert set(asyncio.run(_keep(keeper(keep), deliveries(250), go))) == {None}
    assert sorted(number for batch in kept for number in batch) == list(range(250))
    assert all(batch == sorted(batch) for batch in kept)
    assert len(kept) < 10
    assert max(map(len, kept)) <= MAX_BATCH_SIZE


def test_a_delivery_that_cannot_be_kept_spoils_no_other() -> None:
    """It alone is told so."""
    go = Event()
    go.set()

    def keep(taken: Sequence[ParsedDelivery]) -> None:
        if any(delivery.events == 7 for delivery in taken):
            raise KeyError

    told = asyncio.run(_keep(keeper(keep), deliveries(20), go))
    assert [number for number, error in enumerate(told) if isinstance(error, KeyError)] == [7]
    assert told.count(None) == 19


def test_when_the_store_is_away_it_is_asked_once_for_all() -> None:
    """And all are told; the next ones are tried again."""
    go, asked = Event(), []

    def keep(taken: Sequence[ParsedDelivery]) -> None:
        go.wait(5)
        asked.append(len(taken))
        raise ConnectionError

    kept = keeper(keep, away=(ConnectionError,))
    told = asyncio.run(_keep(kept, deliveries(50), go))
    assert {type(error) for error in told} == {ConnectionError}
    assert len(asked) <= 4
    with pytest.raises(ConnectionError):
        asyncio.run(kept.commit(ParsedDelivery()))


def test_what_looks_like_an_outage_and_is_none_spoils_no_other() -> None:
    """Some of what a database says of a value it says of itself too; if it answers, it is asked for each apart."""
    go, kept = Event(), list[ParsedDelivery]()
    go.set()

    def keep(taken: Sequence[ParsedDelivery]) -> None:
        if any(delivery.events == 7 for delivery in taken):
            raise ConnectionError
        kept.extend(taken)

    told = asyncio.run(_keep(keeper(keep, away=(ConnectionError,), answers=lambda: True), deliveries(100), go))
    assert [number for number, error in enumerate(told) if error] == [7]
    assert len(kept) == 99


def test_one_event_spoils_none_that_came_with_it() -> None:
    """The delivery is asked for again; the others of it are kept by then."""
    kept: list[Any] = []

    def keep(taken: Sequence[ParsedDelivery]) -> None:
        found: list[Any] = [
            one for delivery in taken for one in (*delivery.balances, *delivery.unparsed, *delivery.connection_updates)
        ]
        if "poison" in found:
            raise KeyError
        kept.extend(found)

    given: Any = ParsedDelivery(6, balances=["a", "poison", "b"], unparsed=["c"], connection_updates=["d"])  # type: ignore[list-item]
    with pytest.raises(KeyError):
        asyncio.run(keeper(keep).commit(given))
    assert sorted(kept) == ["a", "b", "c", "d"]


def test_what_fails_once_and_not_again_is_safe() -> None:
    """Two transactions stood in each other's way."""
    tried: list[int] = []

    def keep(taken: Sequence[ParsedDelivery]) -> None:
        tried.append(len(taken))
        if len(tried) == 1:
            raise KeyError

    given: Any = ParsedDelivery(2, balances=["a", "b"])  # type: ignore[list-item]
    asyncio.run(keeper(keep).commit(given))
    assert tried == [1, 1, 1]


def test_when_time_is_up_nothing_more_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider has given up by then."""
    monkeypatch.setattr(module, "BISECT_TIME_BUDGET_S", -1)
    go, asked = Event(), []
    go.set()

    def keep(taken: Sequence[ParsedDelivery]) -> None:
        asked.append(len(taken))
        raise KeyError

    told = asyncio.run(_keep(keeper(keep), deliveries(50), go))
    assert {type(error) for error in told} == {KeyError}
    assert len(asked) <= 4


def test_if_even_asking_fails_all_are_told() -> None:
    """Nobody is left waiting."""

    def keep(_: Sequence[ParsedDelivery]) -> None:
        raise ConnectionError

    def answers() -> bool:
        raise ValueError

    with pytest.raises(ValueError):
        asyncio.run(keeper(keep, away=(ConnectionError,), answers=answers).commit(ParsedDelivery()))


def test_the_answer_does_not_wait_for_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows fails, or takes its time: what comes meanwhile is kept, and followed up together, up to a bound."""
    monkeypatch.setattr(module, "FOLLOW_UP_CAPACITY", 30)
    followed: list[list[int]] = []
    begun, go = Event(), Event()

    def follow(left: Sequence[int]) -> None:
        followed.append(list(left))
        begun.set()
        go.wait(5)
        raise ConnectionError

    async def story() -> None:
        kept = GroupCommitter(lambda taken: taken[0].events, follow)
        for delivery in deliveries(50):
            await kept.commit(delivery)
            assert begun.wait(5)
        assert not go.is_set()
        go.set()
        kept.drain()

    asyncio.run(asyncio.wait_for(story(), 10))
    assert len(followed) == 2
    together = [number for left in followed for number in left]
    assert together == list(range(len(together)))
    assert len(followed[0]) + 30 == len(together)


def test_what_is_left_when_the_loop_ends_is_followed_up() -> None:
    """As when the process is stopped right after an answer: else outcomes would be told by the sweep, much later."""
    followed: list[int] = []
    kept = GroupCommitter(len, followed.extend)
    asyncio.run(kept.commit(ParsedDelivery()))
    kept.drain()
    assert followed == [1]


def test_what_is_kept_while_the_process_ends_is_followed_up() -> None:
    """No thread takes anything on any more: the one that kept it follows it up."""
    followed: list[int] = []
    keeping, go = Event(), Event()

    def keep(taken: Sequence[ParsedDelivery]) -> int:
        keeping.set()
        go.wait(5)
        return len(taken)

    async def story() -> None:
        told = asyncio.create_task(kept.commit(ParsedDelivery()))
        await asyncio.to_thread(keeping.wait, 5)
        finished = asyncio.create_task(asyncio.to_thread(kept.drain))
        await asyncio.to_thread(eventually, lambda: kept._threads._shutdown)
        go.set()
        await asyncio.gather(told, finished)

    kept = GroupCommitter(keep, followed.extend)
    asyncio.run(asyncio.wait_for(story(), 10))
    assert followed == [1]
