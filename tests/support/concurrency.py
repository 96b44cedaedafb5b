"""Run steps in threads that start together."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ROUNDS = 12
"""How often a test repeats a race."""

T = TypeVar("T")


def run_concurrently(*steps: Callable[[], T]) -> list[T]:
    """Run these steps concurrently and return their results."""
    start = threading.Barrier(len(steps))

    def run(step: Callable[[], T]) -> T:
        start.wait(10)
        return step()

    with ThreadPoolExecutor(len(steps)) as pool:
        futures: list[Future[T]] = [pool.submit(run, step) for step in steps]
    return [future.result() for future in futures]
