"""Lists of messages on the broker's Redis that no worker fetches, and samples of their messages."""

import json
import time
from base64 import b64decode
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery

from config.celery_config import QUEUES

OBSERVATION_S = 1.0
"""Time in which a worker would fetch the oldest message of a list."""
SCAN_COUNT = 1000
"""Keys of one SCAN, which takes about 1 ms of the server."""
MAX_KEYS = 500_000
MAX_SEARCH_S = 5.0
MAX_LISTS = 200
"""Maximum lists of each kind of which messages are read."""
SAMPLES_PER_END = 3
"""Messages that are read from each end of a list."""
_LIKELY_NAMES = tuple(queue.encode() for queue in (*QUEUES, "celery"))
"""Parts of the names of lists to which senders and callbacks without payready's options go."""


@dataclass(frozen=True, kw_only=True)
class IdleList:
    """A list whose oldest message no worker fetched within `OBSERVATION_S`."""

    key: str
    length: int
    task_names: frozenset[str]
    """Names of the tasks of the sampled messages."""
    parent_ids: frozenset[str]
    """Ids of the tasks that sent the sampled messages."""


@dataclass(frozen=True, kw_only=True)
class ListSearch:
    """Result of a search for idle lists."""

    idle_lists: Sequence[IdleList]
    searched_keys: int
    """Number of searched keys, approximately."""
    is_complete: bool
    """Whether the search ended before its limits."""


def priority_lists(queue: str, steps: Iterable[int], separator: str, prefix: str) -> list[str]:
    """Return the names of a queue's lists, one for each priority step, as kombu names them."""
    return [f"{prefix}{queue}{separator}{step}" if step else f"{prefix}{queue}" for step in steps]


def search_idle_lists(app: Celery, known_lists: Collection[str]) -> ListSearch:
    """Search the broker's database for idle lists, except `known_lists`.

    The app must have no key prefix: kombu would add it to some of the commands. Raise the error of the broker's client
    if the broker is unavailable.
    """
    deadline = time.monotonic() + MAX_SEARCH_S
    with app.connection_for_read() as connection:
        client = connection.default_channel.client
        keys, searched_keys, is_complete = _scan_lists(client, known_lists, deadline)
        before = dict[bytes, int]()
        for key in keys:
            if time.monotonic() > deadline:
                is_complete = False
                break
            before[key] = _hash_of_oldest_message(client, key)
        if before:
            time.sleep(OBSERVATION_S)
        idle = [key for key, oldest in before.items() if _hash_of_oldest_message(client, key) == oldest]
        samples = [_sample(client, key) for key in idle]
    return ListSearch(
        idle_lists=[sample for sample in samples if sample.length],
        searched_keys=searched_keys,
        is_complete=is_complete,
    )


def _scan_lists(client: Any, known_lists: Collection[str], deadline: float) -> tuple[list[bytes], int, bool]:
    """Return the keys of lists, the number of searched keys, and whether these are all.

    Lists with the name of a queue in their names have their own limit, so that many lists of other apps do not hide
    them.
    """
    known = {key.encode() for key in known_lists}
    likely, others = set[bytes](), set[bytes]()
    searched_keys = cursor = 0
    while True:
        cursor, found = client.scan(cursor, count=SCAN_COUNT, _type="list")
        searched_keys += SCAN_COUNT
        for key in found:
            group = likely if any(name in key for name in _LIKELY_NAMES) else others
            if key not in known and len(group) <= MAX_LISTS:
                group.add(key)
        if not cursor or searched_keys >= MAX_KEYS or time.monotonic() > deadline:
            keys = [*sorted(likely)[:MAX_LISTS], *sorted(others)[:MAX_LISTS]]
            return keys, searched_keys, not cursor and max(len(likely), len(others)) <= MAX_LISTS


def _hash_of_oldest_message(client: Any, key: bytes) -> int:
    return hash(client.lindex(key, -1))


def _sample(client: Any, key: bytes) -> IdleList:
    pipeline = client.pipeline(transaction=False)
    pipeline.llen(key).lrange(key, 0, SAMPLES_PER_END - 1).lrange(key, -SAMPLES_PER_END, -1)
    length, newest, oldest = pipeline.execute()
    origins = [_task_and_parent(message) for message in (*newest, *oldest)]
    return IdleList(
        key=key.decode(errors="backslashreplace"),
        length=length,
        task_names=frozenset(task for task, _ in origins if isinstance(task, str)),
        parent_ids=frozenset(parent for _, parent in origins if isinstance(parent, str)),
    )


def _task_and_parent(message: bytes) -> tuple[object, object]:
    """Return the task name and the parent's id of a message, or None for each that it does not have."""
    try:
        envelope = json.loads(message)
        headers = envelope.get("headers") or {}
        if "task" not in headers:  # message protocol 1
            headers = json.loads(b64decode(envelope["body"]))
        return headers.get("task"), headers.get("parent_id")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None, None
