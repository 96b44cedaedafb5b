"""Deliveries that come at once are made safe at once, and none suffers by another."""

import asyncio
from collections.abc import Sequence
from threading import Event

import pytest

from webhook.events import Delivery
from webhook.keeper import TOGETHER, Keeper


def deliveries(count: int) -> list[Delivery]:
    """Deliveries that can be told apart."""
    return [Delivery(events=number) for number in range(count)]


async def _keep(keeper: Keeper[None], given: Sequence[Delivery], go: Event) -> list[BaseException | None]:
    """Have them kept while the first ones wait for `go`; what each was told."""
    tasks = [asyncio.create_task(keeper.keep(delivery)) for delivery in given]
    await asyncio.sleep(0.05)
    go.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_what_comes_while_others_are_kept_is_kept_together() -> None:
    """Each once, in the order in which they came, not more than so many at a time."""
    go, kept = Event(), []

    def keep(taken: Sequence[Delivery]) -> None:
        go.wait(5)
        kept.append([delivery.events for delivery in taken])

    assert set(asyncio.run(_keep(Keeper(keep, lambda _: None), deliveries(250), go))) == {None}
    assert sorted(number for batch in kept for number in batch) == list(range(250))
    assert all(batch == sorted(batch) for batch in kept)
    assert len(kept) < 10
    assert max(map(len, kept)) <= TOGETHER


def test_a_delivery_that_cannot_be_kept_spoils_no_other() -> None:
    """It alone is told so."""
    go = Event()
    go.set()

    def keep(taken: Sequence[Delivery]) -> None:
        if any(delivery.events == 7 for delivery in taken):
            raise KeyError

    told = asyncio.run(_keep(Keeper(keep, lambda _: None), deliveries(20), go))
    assert [number for number, error in enumerate(told) if isinstance(error, KeyError)] == [7]
    assert told.count(None) == 19


def test_when_the_store_is_away_it_is_asked_once_for_all() -> None:
    """And all are told; the next ones are tried again."""
    go, asked = Event(), []

    def keep(taken: Sequence[Delivery]) -> None:
        go.wait(5)
        asked.append(len(taken))
        raise ConnectionError

    keeper = Keeper(keep, lambda _: None, (ConnectionError,))
    told = asyncio.run(_keep(keeper, deliveries(50), go))
    assert {type(error) for error in told} == {ConnectionError}
    assert len(asked) <= 4
    with pytest.raises(ConnectionError):
        asyncio.run(keeper.keep(Delivery()))
