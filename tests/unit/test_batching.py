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
    busy = threading.Lock()

    def process(batch: list[int]) -> None:
        overlaps.append(not busy.acquire(blocking=False))
        done.extend(batch)
        if not overlaps[-1]:
            busy.release()

    batcher = MicroBatcher(process, max_size=3)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(batcher.add_up_to_capacity, range(20_000)))
    assert sorted(done) == list(range(20_000))
    assert not any(overlaps)


def test_ending_drain_loop_does_not_stop_a_new_one() -> None:
    """Another thread may start a loop between the last check for items and the end of this loop."""
    batches: list[list[int]] = []
    started: list[object] = []
    batcher = MicroBatcher(batches.append, max_size=9, executor=started.append)
    batcher.add_up_to_capacity(1)
    next_batch = batcher._take_batch_after_interval_or_mark_idle

    def add_after_last_check() -> list[int]:
        batch = next_batch()
        if not batch:
            batcher._take_batch_after_interval_or_mark_idle = next_batch  # type: ignore[method-assign]
            batcher.add_up_to_capacity(2)
        return batch

    batcher._take_batch_after_interval_or_mark_idle = add_after_last_check  # type: ignore[method-assign]
    started.pop()()  # type: ignore[operator]
    batcher.add_up_to_capacity(3)
    assert len(started) == 1, "a second loop would run beside the first"
    started.pop()()  # type: ignore[operator]
    assert batches == [[1], [2, 3]]


def test_failed_batch_does_not_block_the_next() -> None:
    batches: list[int] = []

    def process(batch: list[int]) -> None:
        batches.extend(batch)
        if batch == [1]:
            raise ValueError
        if batch == [2]:
            raise SystemExit

    batcher = MicroBatcher(process, max_size=9)
    batcher.add_up_to_capacity(1)
    with pytest.raises(SystemExit):
        batcher.add_up_to_capacity(2)
    batcher.add_up_to_capacity(3)
    assert batches == [1, 2, 3]


def test_full_batch_ignores_the_interval() -> None:
    """Else the interval, which is for few items, would delay many."""
    batches: Queue[list[int]] = Queue()
    with ThreadPoolExecutor(1) as pool:
        batcher = MicroBatcher(batches.put, max_size=3, min_interval_s=20, executor=pool.submit)
        batcher.add_up_to_capacity(1)
        assert batches.get(timeout=10) == [1]
        batcher.add_up_to_capacity(2)
        batcher.add_up_to_capacity(3)
        assert batches.empty(), "the interval has not passed yet"
        batcher.add_up_to_capacity(4, 5)
        assert batches.get(timeout=10) == [2, 3, 4]
        batcher.add_up_to_capacity(6, 7)
        assert batches.get(timeout=10) == [5, 6, 7]
