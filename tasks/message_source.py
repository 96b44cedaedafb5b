"""Where the consumer of a queue gets its messages: the interface that each broker implements."""

from collections.abc import Sequence
from typing import Any, Protocol

from tasks.task_messages import FetchedMessage


class BrokerUnavailable(Exception):
    """The broker did not do what was asked: it is away, read-only, full, loading, or refuses the user."""


class MessageSource(Protocol):
    """One queue of the broker. All methods but `acknowledge` are called by one thread.

    Raises:
        BrokerUnavailable: by all methods but `acknowledge`, `abandon` and `close`. The next call connects again.
    """

    def fetch(self, limit: int, wait_s: float) -> list[FetchedMessage]:
        """Return up to `limit` messages. Without messages wait up to `wait_s` for one.

        A message whose worker has died comes alone. Messages of earlier `acknowledge` calls are acknowledged, also if
        `limit` is 0.
        """

    def acknowledge(self, tags: Sequence[Any]) -> None:
        """Acknowledge messages with the next fetch. Any thread may call this, and it does not wait."""

    def give_back(self, tags: Sequence[Any]) -> None:
        """Return messages to the front of the queue, for any worker, also those that the broker has sent ahead.

        The broker sends no more until the next fetch with a limit above 0.
        """

    def keep(self, tags: Sequence[Any], *, are_retried: bool) -> None:
        """Keep messages that take longer, so that the broker gives them to no other worker.

        `are_retried`: they are processed again, because a store was unavailable. The age of the queue includes them.
        """

    def abandon(self) -> None:
        """Leave all unacknowledged messages to the broker, which delivers them again. The next call connects again.

        For an unexpected error: whether it processed a message is unknown.
        """

    def close(self) -> None:
        """Send the remaining acknowledgements, and close the connection."""
