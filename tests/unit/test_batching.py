"""Micro-batching: batches do not overlap, lose nothing, and start at once when idle."""

import threading
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import pytest

from tasks.batching import MicroBatcher


def test_batches_do_not_overlap_and_lose_no_item() -> None:
    """With several threads that add items."""
    done: list[int] = []
    overlaps: list[bool] = []
    working = threading.Lock()

    def work(batch: list[int]) -> None:
        overlaps.append(not working.acquire(blocking=False))
        done.extend(batch)
        if not overlaps[-1]:
            working.release()

    gatherer = MicroBatcher(work, max_size=3)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(gatherer.add, range(20_000)))
    assert sorted(done) == list(range(20_000))
    assert not any(overlaps)


def test_ending_drain_loop_does_not_stop_a_new_one() -> None:
    """Another thread may start a loop between the last check for items and the end of this loop."""
    batches: list[list[int]] = []
    begun: list[object] = []
    gatherer = MicroBatcher(batches.append, max_size=9, executor=begun.append)
    gatherer.add(1)
    take = gatherer._next_batch

    def and_then_another_comes() -> list[int]:
        taken = take()
        if not taken:
            gatherer._next_batch = take  # type: ignore[method-assign]
            gatherer.add(2)
        return taken

    gatherer._next_batch = and_then_another_comes  # type: ignore[method-assign]
    begun.pop()()  # type: ignore[operator]
    gatherer.add(3)
    assert len(begun) == 1, "a second round would be at work beside the first"
    begun.pop()()  # type: ignore[operator]
    assert batches == [[1], [2, 3]]


def test_requeued_items_are_first() -> None:
    batches: list[list[int]] = []

    def work(batch: list[int]) -> None:
        batches.append(batch)
        if batch == [1]:
            gatherer.add(2)
            gatherer.requeue_first(1, 1)

    gatherer = MicroBatcher(work, max_size=9)
    gatherer.add(1)
    assert batches == [[1], [1, 1, 2]]


def test_failed_batch_does_not_block_the_next() -> None:
    batches: list[int] = []

    def work(batch: list[int]) -> None:
        batches.extend(batch)
        if batch == [1]:
            raise ValueError
        if batch == [2]:
            raise SystemExit

    gatherer = MicroBatcher(work, max_size=9)
    gatherer.add(1)
    with pytest.raises(SystemExit):
        gatherer.add(2)
    gatherer.add(3)
    assert batches == [1, 2, 3]


def test_full_batch_ignores_the_interval() -> None:
    """Else the interval, which is for few items, would delay many."""
    batches: Queue[list[int]] = Queue()
    with ThreadPoolExecutor(1) as pool:
        gatherer = MicroBatcher(batches.put, max_size=3, min_interval_s=20, executor=pool.submit)
        gatherer.add(1)
        assert batches.get(timeout=10) == [1]
        gatherer.add(2)
        gatherer.add(3)
        assert batches.empty(), "the next one is not due yet"
        gatherer.add(4, 5)
        assert batches.get(timeout=10) == [2, 3, 4]
        gatherer.add(6, 7)
        assert batches.get(timeout=10) == [5, 6, 7]
