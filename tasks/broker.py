"""Kombu's Redis transport, made to survive that Redis goes away while a worker works (kombu 5.7)."""

from typing import Any, ClassVar

from kombu.transport import redis


class _QoS(redis.QoS):
    def append(self, message: Any, delivery_tag: str) -> None:
        """Note that a message was taken from its queue.

        It has left the queue before it is noted: if Redis goes away between the two, nobody has it but we.
        """
        try:
            super().append(message, delivery_tag)
        except self.channel.connection_errors:
            delivery = message.delivery_info
            self.channel.strays.append((message._raw, delivery["exchange"], delivery["routing_key"]))  # noqa: SLF001
            raise


class _Channel(redis.Channel):
    QoS = _QoS
    strays: ClassVar[list[tuple[Any, str, str]]] = []
    """Messages that this process has and Redis has not, with their exchange and routing key."""

    def basic_consume(self, *args: Any, **options: Any) -> None:
        """Consume, and first give back what was kept over a lost connection."""
        while self.strays:
            with self.conn_or_acquire() as client, client.pipeline() as pipe:
                self._do_restore_message(*self.strays[0], pipe)
                pipe.execute()
            self.strays.pop(0)
        super().basic_consume(*args, **options)

    def close(self) -> None:
        """Close the channel, whatever its connection is like.

        On a lost connection the first attempt may give up on reading from it. Celery then closes all else, and comes
        back to this channel when there is nothing left by which its unacknowledged messages could go back; that is
        an error which Celery does not expect, and which ends the worker. The second attempt does not read.
        """
        try:
            super().close()
        except self.connection_errors:
            super().close()


class RedisTransport(redis.Transport):
    """Kombu's, with the channel above."""

    Channel = _Channel
