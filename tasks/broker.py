"""Kombu's Redis transport, in which no message is ever in a worker's hands only (kombu 5.7).

Kombu takes a message with BRPOP, and notes it as unacknowledged when it has it: a worker that is killed between the
two, or a Redis that stops, loses the message. Here one script takes and notes it (`take.lua`). A script cannot block,
so a worker that finds its queues empty asks Redis to be told when they are not: reading their lengths it has them
tracked (`CLIENT TRACKING`, RESP3), and the next word on its connection is that one has changed.

Keys and messages are kombu's own, so that workers on either transport can share a broker.
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
"""Messages that are taken at once at most."""
POLL_INTERVAL_S = 1.0
"""How often a worker that waits looks by itself, as often as kombu's BRPOP: a connection that is dead must be seen."""


class BrokerNotSupported(Exception):
    """The broker cannot tell a worker that its queues are no longer empty; see `PAYREADY_BROKER_TRANSPORT`."""


def acknowledge(messages: Sequence[Any]) -> None:
    """Acknowledge messages that one channel brought, whatever its transport; with this one in one round trip."""
    qos = getattr(messages[0].channel, "qos", None)  # a channel of RabbitMQ's has none
    if isinstance(qos, _QoS):
        qos.ack_many([message.delivery_tag for message in messages])
        return
    for message in messages:
        message.ack()


class _QoS(redis.QoS):
    """Knows what is noted already, and acknowledges many at once."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note a message as unacknowledged, if that is still to be done."""
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
    """Queues of which several messages may be taken at once, as far as the worker may hold them."""
    is_tracked_unacked = False
    """Whether the message that is being delivered was noted when it was taken, and nobody has taken charge of it."""
    _pool_client: Any = None
    awaits_invalidation = False
    """Whether the queues were empty, and the next word of Redis is that one of them changed."""

    def _create_client(self, asynchronous: bool = False) -> Any:  # noqa: FBT001, FBT002 - kombu's signature
        """The client of the channel's pool; kombu makes a new one for each message it notes, acknowledges or sends."""
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._pool_client is None or self._pool_client.connection_pool is not self.pool:
            self._pool_client = super()._create_client()
        return self._pool_client

    def _brpop_start(self, timeout: float | None = None) -> None:  # noqa: ARG002 - kombu prescribes the signature
        """Ask for a message."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        free = self.qos.can_consume_max_estimate()
        most = MAX_FETCH if free is None else max(1, min(MAX_FETCH, free))
        counts = {queue: most if queue in self.batched_queues else 1 for queue in queues}
        lists = {self._q_for_pri(queue, urgency): queue for urgency in self.priority_steps for queue in queues}
        keys = [self.unacked_key, self.unacked_index_key, *lists]
        connection = self._in_poll = self.client.connection
        self._brpop_sent_at, self.awaits_invalidation = monotonic(), False
        take = ("EVAL", FETCH, len(keys), *keys, time(), *(counts[queue] for queue in lists.values()))
        connection.send_packed_command(connection.pack_commands([("CLIENT", "TRACKING", "ON", "NOLOOP"), take]))

    def _brpop_read(self, **_: Any) -> bool:
        """Take what Redis answers: messages, or later the word that there may be some.

        Raises:
            Empty: there is no message yet.
        """
        taken = None
        try:
            taken = self._read_response()
        finally:
            if not self.awaits_invalidation:
                self._in_poll = None
                self._flush_brpop_reauth()
        if taken is None:
            raise redis.Empty
        key, *messages = taken
        queue = bytes_to_str(key).rsplit(self.sep, 1)[0]
        self._queue_cycle.rotate(queue)
        with ExitStack() as each:  # one that cannot be delivered does not keep the others from it
            for message in reversed(messages):
                each.callback(self._deliver_one, message, queue)
        return True

    def _deliver_one(self, message: Any, queue: str) -> None:
        payload = loads(bytes_to_str(message))
        self.is_tracked_unacked = True
        try:
            self.connection._deliver(payload, queue)  # noqa: SLF001 - as kombu does
            if self.is_tracked_unacked:  # its consumer acknowledges nothing
                self.qos._remove_from_indices(payload["properties"]["delivery_tag"]).execute()  # noqa: SLF001
        finally:
            self.is_tracked_unacked = False

    def _read_response(self) -> Any:
        connection = self.client.connection
        try:
            if self.awaits_invalidation:
                self.awaits_invalidation = False
                connection.read_response(push_request=True)
                return None
            self._check_client_tracking(connection)
            taken = connection.read_response()
            # What came in the same breath is in a buffer, where the event loop does not see it.
            self.awaits_invalidation = taken is None and not connection.can_read(timeout=0)
        except (*self.connection_errors, self.ResponseError):
            connection.disconnect()  # there may be an answer left that nobody waits for
            raise
        return taken

    def _check_client_tracking(self, connection: Any) -> None:
        try:
            connection.read_response()
        except self.ResponseError as error:
            connection.disconnect()
            raise BrokerNotSupported(
                f"the broker refuses CLIENT TRACKING ({error}); with PAYREADY_BROKER_TRANSPORT=kombu payready does "
                "without it, but a worker that is killed may then lose the message it was just taking"
            ) from error

    def _update_queue_cycle(self) -> None:
        """Have the new queues looked at as well, without waiting for the old ones."""
        super()._update_queue_cycle()
        if self.awaits_invalidation:
            self._in_poll, self.awaits_invalidation = None, False

    def poll(self) -> None:
        """Ask again, if waiting."""
        if self.awaits_invalidation and self._in_poll and self.qos.can_consume():
            self._brpop_start()

    def close(self) -> None:
        """Close the channel, whatever its connection is like.

        On a lost connection the first attempt may give up on reading from it. Celery then closes all else, and comes
        back to this channel when there is nothing left by which its unacknowledged messages could go back; that is
        an error which Celery does not expect, and which ends the worker. The second attempt does not read.
        """
        if self.awaits_invalidation:
            self._in_poll = None  # no answer is due
        try:
            super().close()
        except self.connection_errors:
            super().close()


class RedisTransport(redis.Transport):
    """Kombu's, with the channel above."""

    Channel = _Channel

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Have the channels served by the worker's loop."""
        super().register_with_event_loop(connection, loop)
        loop.call_repeatedly(POLL_INTERVAL_S, self._poll_channels)

    def _poll_channels(self) -> None:
        for channel in self.cycle._channels:  # noqa: SLF001 - as kombu does
            channel.poll()
