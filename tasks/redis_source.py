"""Messages of one queue in Redis, with the lists and messages of kombu's transport.

Kombu pops a message with BRPOP and then stores it as unacknowledged: a worker that is killed between the two commands
loses the message. Here one Lua script does both (`fetch.lua`), and acknowledges earlier messages. A script cannot
block, so the connection enables `CLIENT TRACKING` (RESP3): Redis sends an invalidation message when a list changes that
the script has read.

The reliable queue of Redis' documentation (`BLMOVE`, `LREM`) would need no script. It costs the same time for each
message, but it blocks on one list only and a queue has several, and a full Redis refuses it;
see `docs/decisions/0013-own-consumer.md`.
"""

import time
from collections import deque
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, cast
from uuid import uuid4

from redis import RedisError
from redis.exceptions import NoPermissionError, NoScriptError, ResponseError

from config.log_config import get_logger
from tasks.message_source import BrokerUnavailable
from tasks.task_messages import FetchedMessage
from worker.correlation.redis_client import open_redis
from worker.errors import error_summary

log = get_logger(__name__)

POLL_INTERVAL_S = 0.1
"""Interval between fetches if Redis does not support `CLIENT TRACKING`."""
SOCKET_TIMEOUT_S = 10
MAX_TAGS = 500
"""Maximum number of tags of one script."""
_FETCH = files(__package__).joinpath("fetch.lua").read_text()
_KEEP = files(__package__).joinpath("keep.lua").read_text()
_GIVE_BACK = files(__package__).joinpath("give_back.lua").read_text()


def _batches(tags: Sequence[str]) -> list[Sequence[str]]:
    """Return the tags in parts, because Redis serves no other client while a script runs."""
    return [tags[start : start + MAX_TAGS] for start in range(0, len(tags), MAX_TAGS)]


def unacked_keys(queue: str, key_prefix: str) -> tuple[str, str, str]:
    """Return the keys of a queue's unacknowledged messages, of their index, and of the index of retried messages.

    `queue` is the name without the instance, which the prefix ends with.
    """
    key = f"{key_prefix}payready-unacked:{queue}"
    return key, f"{key}:index", f"{key}:retried"


class RedisSource:
    """A `MessageSource` of a queue in Redis.

    `lists`: the lists of the queue, in order of priority. Messages of a worker that did not acknowledge, give back or
    keep them for `visibility_timeout_s` are fetched again.
    """

    def __init__(
        self, url: str, queue: str, *, lists: Sequence[str], key_prefix: str, visibility_timeout_s: float
    ) -> None:
        self._queue, self._visibility_timeout_s = queue, visibility_timeout_s
        self._redis = open_redis(url, protocol=3, socket_timeout=SOCKET_TIMEOUT_S)
        self._connection: Any = None
        self._is_tracking = False
        self._is_empty = False
        """Whether the lists were empty after the last fetch."""
        self._unacked_keys = unacked_keys(queue, key_prefix)
        self._keys = (*self._unacked_keys, *lists)
        self._acknowledged = deque[str]()
        self._tag_prefix, self._fetches = uuid4().hex, 0

    def fetch(self, limit: int, wait_s: float) -> list[FetchedMessage]:
        """Return messages. If the last fetch has emptied the lists, wait for an invalidation message first."""
        try:
            if self._is_empty and limit:
                self._wait_for_change(wait_s)
            return self._acknowledge_and_fetch(limit)
        except (RedisError, OSError) as error:
            raise self._disconnect(error) from error

    def acknowledge(self, tags: Sequence[str]) -> None:
        """Acknowledge messages with the next fetch."""
        self._acknowledged.extend(tags)

    def give_back(self, tags: Sequence[str]) -> None:
        """Return messages to the front of their lists. Redis sends none ahead."""
        if not tags:
            return
        try:
            for some in reversed(_batches(tags)):
                self._redis.eval(_GIVE_BACK, len(self._keys), *self._keys, *some)
        except (RedisError, OSError) as error:
            raise self._disconnect(error) from error

    def keep(self, tags: Sequence[str], *, are_retried: bool) -> None:
        """Start the visibility timeout of messages anew."""
        _, *indexes = self._unacked_keys
        try:
            for some in _batches(tags):
                self._redis.eval(_KEEP, len(indexes), *indexes, int(are_retried), *some)
        except (RedisError, OSError) as error:
            raise self._disconnect(error) from error

    def abandon(self) -> None:
        """Do nothing: Redis keeps the messages until their visibility timeout."""

    def close(self) -> None:
        """Send the remaining acknowledgements, and close the connections."""
        try:
            self._acknowledge_and_fetch(0)
        except (RedisError, OSError) as error:  # the messages will be processed once more
            log.warning("messages.ack_failed", queue=self._queue, error=error_summary(error))
        self._redis.close()

    def _acknowledge_and_fetch(self, limit: int) -> list[FetchedMessage]:
        connection = self._connect()
        acknowledged = list(self._acknowledged)
        self._fetches += 1
        new_tags = f"{self._tag_prefix}:{self._fetches}"
        arguments = (self._visibility_timeout_s, limit, new_tags, *acknowledged)
        reply = self._evaluate(connection, (len(self._keys), *self._keys, *arguments))
        for _ in acknowledged:  # other threads only append
            self._acknowledged.popleft()
        fetched = [
            FetchedMessage(tag=tag.decode(), deliveries=deliveries, text=text)
            for tag, deliveries, text in zip(reply[0::3], reply[1::3], reply[2::3], strict=True)
        ]
        is_redelivered = any(message.deliveries > 1 for message in fetched)  # it comes alone
        self._is_empty = len(fetched) < limit and not is_redelivered
        return fetched

    def _evaluate(self, connection: Any, arguments: Sequence[Any]) -> Any:
        connection.send_command("EVALSHA", self._digest, *arguments)
        try:
            return connection.read_response()
        except NoScriptError:  # Redis was restarted or flushed, and lost its scripts
            connection.send_command("EVAL", _FETCH, *arguments)
            return connection.read_response()

    def _connect(self) -> Any:
        """Return the connection of the fetches. It enables `CLIENT TRACKING` if Redis supports it."""
        if self._connection is None:
            self._connection = connection = cast(Any, self._redis.connection_pool.get_connection())
            connection.send_command("SCRIPT", "LOAD", _FETCH)
            self._digest = connection.read_response().decode()
            connection.send_command("CLIENT", "TRACKING", "ON", "NOLOOP")
            try:
                connection.read_response()
                self._is_tracking = True
            except ResponseError as error:
                if not isinstance(error, NoPermissionError) and "unknown" not in str(error).lower():
                    raise
                self._is_tracking = False
                log.warning("broker.polled", queue=self._queue, interval_s=POLL_INTERVAL_S, error=error_summary(error))
        return self._connection

    def _wait_for_change(self, wait_s: float) -> None:
        if not self._is_tracking:
            time.sleep(min(wait_s, POLL_INTERVAL_S))
        elif self._connection.can_read(timeout=wait_s):
            self._connection.read_response(push_request=True)

    def _disconnect(self, error: Exception) -> BrokerUnavailable:
        """Close the connections, because an unread response may be left on one. Return the error to raise."""
        if self._connection is not None:
            self._connection.disconnect()
            self._redis.connection_pool.release(self._connection)
            self._connection, self._is_empty = None, False
        self._redis.connection_pool.disconnect()  # of a primary that became a replica, for example
        return BrokerUnavailable(error_summary(error))
