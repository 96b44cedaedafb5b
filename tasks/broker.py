"""Kombu's Redis transport with an atomic fetch, so that no message exists only in a worker's memory (kombu 5.7).

Kombu pops a message with BRPOP and then stores it in `unacked`. A worker that is killed between the two commands, or a
Redis that stops, loses the message. Here one Lua script does both (`fetch.lua`). A script cannot block, so an idle
worker enables `CLIENT TRACKING` (RESP3) on the queue keys: the script reads their lengths. The worker then waits for
the invalidation message, which Redis sends when a queue changes.

Keys and messages are kombu's own, so workers with either transport can share a broker.
"""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from importlib.resources import files
from time import monotonic, time
from typing import Any

from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

FETCH = files(__package__).joinpath("fetch.lua").read_text()
MAX_FETCH = 50
"""Maximum number of messages of one fetch."""
POLL_INTERVAL_S = 1.0
"""Interval at which an idle worker fetches without an invalidation message, as kombu's BRPOP does.

This detects a dead connection."""


class BrokerNotSupported(Exception):
    """The broker does not support `CLIENT TRACKING`; see `PAYREADY_BROKER_TRANSPORT`."""


def acknowledge(messages_of_channel: Sequence[Any]) -> None:
    """Acknowledge messages of one channel. With this transport it takes one round trip."""
    qos = getattr(messages_of_channel[0].channel, "qos", None)  # a RabbitMQ channel has none
    if isinstance(qos, _QoS):
        qos.ack_many([message.delivery_tag for message in messages_of_channel])
        return
    for message in messages_of_channel:
        message.ack()


class _QoS(redis.QoS):
    """Unacknowledged messages of a channel, without a second write for messages that the fetch tracked."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Track a message as unacked, unless the fetch did so."""
        if self.channel.is_tracked_unacked:
            self.channel.is_tracked_unacked = False
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack_many(self, delivery_tags: Sequence[str]) -> None:
        """Acknowledge messages in one round trip."""
        with self.pipe_or_acquire() as pipe:
            pipe.zrem(self.unacked_index_key, *delivery_tags).hdel(self.unacked_key, *delivery_tags).execute()
        for tag in delivery_tags:
            virtual.QoS.ack(self, tag)


class _Channel(redis.Channel):
    QoS = _QoS
    from_transport_options = (*redis.Channel.from_transport_options, "batched_queues")
    batched_queues: Collection[str] = ()
    """Queues from which one fetch takes several messages, up to the free prefetch count."""
    is_tracked_unacked = False
    """Whether the fetch tracked the message that is being delivered, and no consumer has accepted it yet."""
    _pool_client: Any = None
    awaits_invalidation = False
    """Whether the last fetch found the queues empty, so that the next message of Redis is an invalidation."""

    def _create_client(self, asynchronous: bool = False) -> Any:  # noqa: FBT001, FBT002 - kombu's signature
        """Return one client for the pool. Kombu creates one for each message that it tracks, acknowledges or sends."""
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._pool_client is None or self._pool_client.connection_pool is not self.pool:
            self._pool_client = super()._create_client()
        return self._pool_client

    def _brpop_start(self, timeout: float | None = None) -> None:  # noqa: ARG002 - kombu prescribes the signature
        """Send a fetch."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        free = self.qos.can_consume_max_estimate()
        max_count = MAX_FETCH if free is None else max(1, min(MAX_FETCH, free))
        counts = {queue: max_count if queue in self.batched_queues else 1 for queue in queues}
        lists = {self._q_for_pri(queue, priority): queue for priority in self.priority_steps for queue in queues}
        keys = [self.unacked_key, self.unacked_index_key, *lists]
        connection = self._in_poll = self.client.connection
        self._brpop_sent_at, self.awaits_invalidation = monotonic(), False
        fetch = ("EVAL", FETCH, len(keys), *keys, time(), *(counts[queue] for queue in lists.values()))
        connection.send_packed_command(connection.pack_commands([("CLIENT", "TRACKING", "ON", "NOLOOP"), fetch]))

    def _brpop_read(self, **_: Any) -> bool:
        """Read the response to a fetch, or an invalidation message, and deliver the fetched messages.

        Raises:
            Empty: no message was fetched.
        """
        fetched = None
        try:
            fetched = self._read_fetch_or_invalidation()
        finally:
            if not self.awaits_invalidation:
                self._in_poll = None
                self._flush_brpop_reauth()
        if fetched is None:
            raise redis.Empty
        key, *messages = fetched
        queue = bytes_to_str(key).rsplit(self.sep, 1)[0]
        self._queue_cycle.rotate(queue)
        with ExitStack() as deliveries:  # an error of one message does not stop the delivery of the others
            for message in reversed(messages):
                deliveries.callback(self._deliver_one, message, queue)
        return True

    def _deliver_one(self, message: Any, queue: str) -> None:
        payload = loads(bytes_to_str(message))
        self.is_tracked_unacked = True
        try:
            self.connection._deliver(payload, queue)  # noqa: SLF001 - as kombu does
            if self.is_tracked_unacked:  # a consumer with no_ack never acknowledges
                self.qos._remove_from_indices(payload["properties"]["delivery_tag"]).execute()  # noqa: SLF001
        finally:
            self.is_tracked_unacked = False

    def _read_fetch_or_invalidation(self) -> Any:
        connection = self.client.connection
        try:
            if self.awaits_invalidation:
                self.awaits_invalidation = False
                connection.read_response(push_request=True)
                return None
            self._check_client_tracking(connection)
            fetched = connection.read_response()
            # The invalidation may be in the client's buffer already, where the event loop does not see it.
            self.awaits_invalidation = fetched is None and not connection.can_read(timeout=0)
        except (*self.connection_errors, self.ResponseError):
            connection.disconnect()  # an unread response may be left on it
            raise
        return fetched

    def _check_client_tracking(self, connection: Any) -> None:
        try:
            connection.read_response()
        except self.ResponseError as error:
            connection.disconnect()
            raise BrokerNotSupported(
                f"the broker does not support CLIENT TRACKING ({error}); set PAYREADY_BROKER_TRANSPORT=kombu to run "
                "without it, but then a worker that is killed may lose the message that it is fetching"
            ) from error

    def _update_queue_cycle(self) -> None:
        """Send a new fetch for the new set of queues, without waiting for an invalidation."""
        super()._update_queue_cycle()
        if self.awaits_invalidation:
            self._in_poll, self.awaits_invalidation = None, False

    def fetch_if_idle(self) -> None:
        """Send a fetch if the channel is idle."""
        if self.awaits_invalidation and self._in_poll and self.qos.can_consume():
            self._brpop_start()

    def close(self) -> None:
        """Close the channel, also on a lost connection.

        On a lost connection the first attempt may fail while it reads. Celery would then close everything else and
        retry this channel without a connection to restore its unacknowledged messages. Celery does not expect that
        error, and the worker would exit. The second attempt does not read.
        """
        if self.awaits_invalidation:
            self._in_poll = None  # no response is pending
        try:
            super().close()
        except self.connection_errors:
            super().close()


class RedisTransport(redis.Transport):
    """Kombu's Redis transport with the atomic fetch."""

    Channel = _Channel

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Register the channels with the worker's event loop, and poll idle ones every `POLL_INTERVAL_S`."""
        super().register_with_event_loop(connection, loop)
        loop.call_repeatedly(POLL_INTERVAL_S, self._fetch_from_idle_channels)

    def _fetch_from_idle_channels(self) -> None:
        for channel in self.cycle._channels:  # noqa: SLF001 - as kombu does
            channel.fetch_if_idle()
