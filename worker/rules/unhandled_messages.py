"""Messages of our queues that no worker can process, and why."""

from dataclasses import dataclass
from enum import StrEnum


class DeadLetterReason(StrEnum):
    """Why a message is a dead letter."""

    UNREADABLE = "unreadable"
    """Its envelope or its body cannot be decoded."""
    UNKNOWN_TASK = "unknown_task"
    """No task of payready has the name in its headers."""
    WORKER_DIED = "worker_died"
    """Its worker died while it processed the message, five times in a row."""


@dataclass(frozen=True, kw_only=True)
class UnhandledMessage:
    """A message that no worker can process."""

    queue: str
    """The queue of payready that it was fetched from, never a name from the message."""
    reason: DeadLetterReason
    detail: str
    """The field and the rule that it breaks. It is logged, so it has no value from the body."""
    message: bytes
    """The message as it lies in the list of kombu's virtual transport, whatever its form.

    On RabbitMQ the consumer builds the JSON text that kombu would store: `body` (base64), `content-type`,
    `content-encoding`, `headers` and `properties`."""
    task_id: str | None = None
    """Id of its task, if it can be read."""
    task_name: str | None = None
    """Name of its task, if it can be read."""
