"""Dead letters: store messages that no worker can process, and delete them on request or beyond limits."""

from collections.abc import Iterator, Sequence

from config.log_config import get_logger
from worker import metrics
from worker.ledger import dead_letters
from worker.ledger.dead_letters import DeadLetterSummary
from worker.ledger.engine import read_snapshot, transaction
from worker.rules.unhandled_messages import DeadLetterReason, UnhandledMessage
from worker.runtime import Runtime

log = get_logger(__name__)
PAGE_SIZE = 200


def store_dead_letters(rt: Runtime, messages: Sequence[UnhandledMessage]) -> None:
    """Store messages as dead letters, count and log them. Everything is committed on return.

    The caller acknowledges the messages afterwards. Storing a message again adds no row.

    Raises:
        DATABASE_UNAVAILABLE: nothing was stored; the messages must not be acknowledged.
    """
    with transaction(rt.engine) as tx:
        ids = dead_letters.store(tx, messages, rt.clock())
    for dead_letter_id, message in zip(ids, messages, strict=True):
        metrics.DEAD_LETTERS.labels(message.reason.value).inc()
        log.warning(
            "message.dead_lettered",
            dead_letter_id=dead_letter_id,
            queue=message.queue,
            reason=message.reason.value,
            detail=dead_letters.bounded_text(message.detail),
        )


def delete_dead_letters(rt: Runtime, dead_letter_ids: Sequence[str]) -> int:
    """Delete dead letters. Return how many were deleted."""
    with transaction(rt.engine) as tx:
        return dead_letters.delete_letters(tx, dead_letter_ids)


def delete_requeued_dead_letter(rt: Runtime, requeued: DeadLetterSummary) -> None:
    """Delete a dead letter after its message was sent to its queue again.

    If a worker has already stored the message again, that dead letter stays.
    """
    with transaction(rt.engine) as tx:
        dead_letters.delete_unless_stored_again(tx, requeued)


def prune_dead_letters_beyond_limits(rt: Runtime) -> None:
    """Delete the oldest dead letters beyond the limits of age, number and bytes."""
    with transaction(rt.engine) as tx:
        count = dead_letters.prune(tx, rt.clock())
    if count:
        log.error("dead_letters.pruned", count=count)


def every_dead_letter_id(rt: Runtime, reason: DeadLetterReason | None = None) -> Iterator[str]:
    """Iterate in pages, in the order of the ids. A dead letter that is stored meanwhile is not visited twice."""
    after_id = ""
    while page := _page(rt, after_id, reason):
        yield from page
        after_id = page[-1]


def _page(rt: Runtime, after_id: str, reason: DeadLetterReason | None) -> list[str]:
    with read_snapshot(rt.engine) as tx:
        return dead_letters.ids_after(tx, after_id=after_id, reason=reason, limit=PAGE_SIZE)
