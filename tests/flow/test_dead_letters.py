"""Dead letters: messages that no worker can process are stored, counted and logged, and limited."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.support.in_process import InProcessSystem
from worker import flow
from worker.ledger import dead_letters, quarantine
from worker.ledger.dead_letters import DeadLetter, DeadLetterSummary
from worker.ledger.engine import DATABASE_UNAVAILABLE, open_engine, read_snapshot
from worker.ledger.retention import RetentionLimits
from worker.ledger_metrics import LedgerCollector
from worker.metrics import DEAD_LETTERS
from worker.quiltt.messages import UnparsedEvent
from worker.rules.unhandled_messages import DeadLetterReason, UnhandledMessage

UNREADABLE = UnhandledMessage(
    queue="payments", reason=DeadLetterReason.UNREADABLE, detail="body is missing", message=b'{"headers": {}}'
)
WORKER_DIED = replace(UNREADABLE, reason=DeadLetterReason.WORKER_DIED, detail="processed 5 times")


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the log events with their fields."""
    lines: list[Any] = [record.msg for record in caplog.records]
    return [line for line in lines if isinstance(line, dict)]


def stored(payready: InProcessSystem) -> list[DeadLetterSummary]:
    """Return all dead letters, the newest first."""
    with read_snapshot(payready.engine) as tx:
        assert dead_letters.count(tx) == len(dead_letters.newest(tx, 1000))
        return dead_letters.newest(tx, 1000)


def the_only(payready: InProcessSystem) -> DeadLetter:
    """Return the only dead letter with its message."""
    [summary] = stored(payready)
    with read_snapshot(payready.engine) as tx:
        letter = dead_letters.find_letter(tx, summary.dead_letter_id)
    assert letter is not None
    return letter


def counted(reason: DeadLetterReason) -> float:
    """Return the value of the counter."""
    return float(DEAD_LETTERS.labels(reason.value)._value.get())


def test_message_is_stored_whole_and_counted_and_logged(
    payready: InProcessSystem, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything that was known about it is stored; its task may be unknown."""
    before = counted(DeadLetterReason.UNKNOWN_TASK)
    other = UnhandledMessage(
        queue="refreshes",
        reason=DeadLetterReason.UNKNOWN_TASK,
        detail="headers.task is no task of payready",
        message=bytes(range(256)),
        task_id="task-1",
        task_name="balances.refrsh",
    )
    flow.store_dead_letters(payready.rt, [other])
    letter = the_only(payready)
    assert (letter.queue, letter.reason, letter.detail) == (other.queue, other.reason, other.detail)
    assert (letter.task_id, letter.task_name, letter.message) == ("task-1", "balances.refrsh", other.message)
    assert (letter.size_bytes, letter.is_cut, letter.occurrences) == (256, False, 1)
    assert letter.stored_at == payready.clock.now
    assert counted(DeadLetterReason.UNKNOWN_TASK) == before + 1
    [line] = logged(caplog)
    assert (line["event"], line["level"], line["dead_letter_id"]) == (
        "message.dead_lettered",
        "warning",
        letter.dead_letter_id,
    )
    assert (line["queue"], line["reason"], line["detail"]) == ("refreshes", "unknown_task", other.detail)


def test_message_that_is_stored_again_adds_no_row(payready: InProcessSystem) -> None:
    """A worker may stop between storing and acknowledging. The last reason and time count."""
    flow.store_dead_letters(payready.rt, [UNREADABLE, UNREADABLE])
    first = the_only(payready)
    payready.clock.advance(60)
    flow.store_dead_letters(payready.rt, [WORKER_DIED])
    last = the_only(payready)
    assert (first.dead_letter_id, first.reason, first.occurrences) == (
        last.dead_letter_id,
        DeadLetterReason.UNREADABLE,
        2,
    )
    assert (last.reason, last.detail, last.occurrences) == (DeadLetterReason.WORKER_DIED, "processed 5 times", 3)
    assert last.stored_at - first.stored_at == timedelta(seconds=60)


def test_same_message_of_another_queue_is_another_dead_letter(payready: InProcessSystem) -> None:
    """Each is requeued to its own queue."""
    flow.store_dead_letters(payready.rt, [UNREADABLE, replace(UNREADABLE, queue="balances")])
    assert {letter.queue for letter in stored(payready)} == {"payments", "balances"}


def test_long_message_is_cut_and_marked(payready: InProcessSystem) -> None:
    """Two long messages with the same beginning are two dead letters."""
    limit = dead_letters.MAX_MESSAGE_BYTES
    flow.store_dead_letters(payready.rt, [replace(UNREADABLE, message=b"x" * limit)])
    assert (the_only(payready).is_cut, the_only(payready).size_bytes) == (False, limit)
    for end in (b"a", b"b"):
        flow.store_dead_letters(payready.rt, [replace(UNREADABLE, message=b"x" * limit + end)])
    sizes = {}
    for summary in stored(payready):
        with read_snapshot(payready.engine) as tx:
            letter = dead_letters.find_letter(tx, summary.dead_letter_id)
        assert letter is not None
        sizes[letter.dead_letter_id] = (letter.size_bytes, len(letter.message), letter.is_cut)
    assert sorted(sizes.values()) == [(limit, limit, False), (limit + 1, limit, True), (limit + 1, limit, True)]


@pytest.mark.parametrize("text", ["\0", "\ud800", "a\nb", "\x1b[2J\u202e", "x" * 5000, "\0" * 5000])
def test_hostile_texts_are_stored_bounded_on_one_line(
    payready: InProcessSystem, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    """PostgreSQL stores no NUL and no surrogate; a terminal would obey control characters."""
    flow.store_dead_letters(payready.rt, [replace(UNREADABLE, detail=text, task_id=text, task_name=text)])
    letter = the_only(payready)
    for kept in (letter.detail, letter.task_id, letter.task_name, logged(caplog)[0]["detail"]):
        assert kept is not None
        assert kept.isprintable()
        assert 0 < len(kept) <= dead_letters.MAX_TEXT_LENGTH


def test_message_stored_again_before_its_deletion_is_not_lost(payready: InProcessSystem) -> None:
    """`requeue` sends a message and then deletes it. A worker may store it again between the two."""
    flow.store_dead_letters(payready.rt, [UNREADABLE])
    read = the_only(payready)
    flow.store_dead_letters(payready.rt, [UNREADABLE])
    flow.delete_requeued_dead_letter(payready.rt, read)
    assert the_only(payready).occurrences == 2
    flow.delete_requeued_dead_letter(payready.rt, the_only(payready))
    assert stored(payready) == []


def test_nothing_is_counted_while_database_is_unavailable(payready: InProcessSystem) -> None:
    """The caller must not acknowledge the message."""
    before = counted(DeadLetterReason.UNREADABLE)
    away = replace(payready.rt, engine=open_engine("postgresql://127.0.0.1:1/none", connections=1))
    with pytest.raises(DATABASE_UNAVAILABLE):
        flow.store_dead_letters(away, [UNREADABLE])
    assert counted(DeadLetterReason.UNREADABLE) == before


def test_empty_list_stores_nothing(payready: InProcessSystem) -> None:
    flow.store_dead_letters(payready.rt, [])
    assert stored(payready) == []


def test_stored_dead_letters_are_exported(payready: InProcessSystem) -> None:
    flow.store_dead_letters(payready.rt, [UNREADABLE, replace(UNREADABLE, message=b"other")])
    samples = {sample.name: sample.values for sample in LedgerCollector(payready.rt)()}
    assert samples["payready_stored_dead_letters"] == {(): 2.0}


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        (RetentionLimits(), "abcde"),
        (RetentionLimits(max_age=timedelta(days=3)), "abcd"),
        (RetentionLimits(max_rows=3), "abc"),
        (RetentionLimits(max_bytes=29), "ab"),
    ],
)
def test_prune_deletes_oldest_beyond_limits(
    payready: InProcessSystem,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limits: RetentionLimits,
    kept: str,
) -> None:
    """The limits are age, number and bytes, for dead letters and for the quarantine. A deletion is an error in the log.

    The time of the last storing counts.
    """
    for module in (dead_letters, quarantine):
        monkeypatch.setattr(module, "LIMITS", limits)
    now = payready.clock.now
    for age_days, name in reversed(list(enumerate("abcde"))):
        payready.clock.now = now - timedelta(days=age_days)
        flow.store_dead_letters(payready.rt, [replace(UNREADABLE, message=name.encode() * 10, detail=name)])
        event = UnparsedEvent(raw=name.encode() * 10, reason=name)
        flow.ingest_events_and_resolve_payments(payready.rt, [], [event])
    flow.prune_dead_letters_beyond_limits(payready.rt)
    flow.prune_quarantine_beyond_limits(payready.rt)
    assert "".join(letter.detail for letter in stored(payready)) == kept
    with read_snapshot(payready.engine) as tx:
        assert "".join(event.reason for event in quarantine.newest_events(tx, 10)) == kept
    deleted = 5 - len(kept)
    expected = [("dead_letters.pruned", deleted), ("quarantine.pruned", deleted)] if deleted else []
    pruned = [(line["event"], line["count"]) for line in logged(caplog) if line["level"] == "error"]
    assert pruned == expected
