"""Commands about dead letters, with a real Valkey: list, show, requeue, delete, and the doctor's check."""

import json
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from redis import Redis
from typer.testing import CliRunner

from cli.doctor_checks import check_dead_letters
from cli.doctor_results import CheckContext, CheckResult, Severity
from cli.main import app
from config.clock import utc_now
from config.settings import Settings, settings
from tasks import message_requeue
from tests.cli.conftest import NOON, LedgerBuilder
from worker import flow
from worker.ledger import dead_letters
from worker.ledger.engine import transaction
from worker.rules.unhandled_messages import DeadLetterReason, UnhandledMessage
from worker.runtime import build_runtime

Run = Callable[..., Any]
HOSTILE = "\x1b[2J\x07\u202e[red]"
BODY = f'[["acct_{HOSTILE}"], {{}}, {{}}]'.encode()
READABLE = UnhandledMessage(
    queue="payments",
    reason=DeadLetterReason.WORKER_DIED,
    detail="its worker died 5 times",
    message=json.dumps(
        {
            "body": b64encode(BODY).decode(),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"id": "task-1", "task": "payments.initiate", "note": "\x7f"},
            "properties": {"body_encoding": "base64", "delivery_tag": "tag-1", "delivery_info": {"exchange": "x"}},
        }
    ).encode(),
    task_id="task-1",
    task_name="payments.initiate",
)
MALFORMED = UnhandledMessage(
    queue="refreshes",
    reason=DeadLetterReason.UNREADABLE,
    detail=f"not JSON {HOSTILE}",
    message=b"\xff\x00 {" + HOSTILE.encode(),
)
TOO_LONG = replace(MALFORMED, detail="too long", message=b"[" * (dead_letters.MAX_MESSAGE_BYTES + 1))


@pytest.fixture
def redis(valkey_url: str) -> Iterator["Redis"]:
    with Redis.from_url(valkey_url) as client:
        client.delete("payments", "refreshes")
        yield client
        client.delete("payments", "refreshes")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, valkey_url: str, ledger: LedgerBuilder, redis: "Redis") -> Run:
    """Return a function that runs a command, with a broker and an empty ledger."""
    monkeypatch.setenv("PAYREADY_REDIS_URL", valkey_url)
    monkeypatch.setenv("PAYREADY_DATABASE_URL", ledger.url)
    for module in ("cli.dead_letter_actions", "cli.command_line", "cli.command_runtime"):
        monkeypatch.setattr(f"{module}.settings", settings.__wrapped__)
    return lambda *arguments, typed=None: CliRunner().invoke(app, ["dead-letters", *arguments], input=typed)


def store(ledger: LedgerBuilder, *messages: UnhandledMessage) -> list[str]:
    """Store dead letters. Return their ids."""
    with transaction(ledger.engine) as tx:
        return dead_letters.store(tx, messages, NOON)


def remaining(ledger: LedgerBuilder) -> list[str]:
    """Return the ids of all dead letters."""
    with transaction(ledger.engine) as tx:
        return dead_letters.ids_after(tx, after_id="", reason=None, limit=100)


def test_requeue_sends_to_the_queue_of_the_instance(
    run: Run, ledger: LedgerBuilder, redis: "Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stored name has no instance, so a dead letter outlives a change of the instance."""
    monkeypatch.setenv("PAYREADY_INSTANCE", "live")
    redis.delete("live.payments")
    [dead_letter_id] = store(ledger, READABLE)
    assert run("requeue", dead_letter_id).exit_code == 0
    assert redis.lrange("live.payments", 0, -1) == [READABLE.message]
    redis.delete("live.payments")


def test_list_has_short_printable_lines(run: Run, ledger: LedgerBuilder) -> None:
    """It has nothing of the message."""
    assert "no dead letters" in run("list").stdout
    ids = store(ledger, READABLE, MALFORMED)
    output = run("list").stdout
    assert all(dead_letter_id in output for dead_letter_id in ids)
    assert output.replace("\n", "").isprintable()
    assert "acct_" not in output
    assert "worker_died" in output
    lines = {line["dead_letter_id"]: line for line in json.loads(run("list", "--json").stdout)}
    assert lines[ids[0]] == {
        "dead_letter_id": ids[0],
        "queue": "payments",
        "reason": "worker_died",
        "detail": "its worker died 5 times",
        "task_id": "task-1",
        "task_name": "payments.initiate",
        "size_bytes": len(READABLE.message),
        "occurrences": 1,
        "stored_at": "2026-11-22T12:00:00Z",
    }


def test_show_decodes_message_and_escapes_control_characters(run: Run, ledger: LedgerBuilder) -> None:
    """A terminal obeys no byte of a message."""
    [dead_letter_id] = store(ledger, READABLE)
    output = run("show", dead_letter_id).stdout
    assert output.replace("\n", "").isprintable()
    assert "worker_died: its worker died 5 times" in output
    assert "queue payments, task payments.initiate, task id task-1" in output
    assert "2026-11-22 12:00:00Z" in output
    assert r'[["acct_\x1b[2J\x07\u202e[red]"], {}, {}]' in output
    assert json.loads(run("show", dead_letter_id, "--json").stdout)["body"] == BODY.decode()


@pytest.mark.parametrize(
    "message",
    [
        MALFORMED.message,
        b"",
        b"null",
        b"[" * 200_000,
        b'{"body": ' + b'{"a":' * 40_000,
        b'{"body": "%%%", "headers": {}, "properties": {}}',
        b'{"body": "\\ud800"}',
        b'{"body": 1e999}',
        b'{"headers": {"id": ' + b"9" * 100_000 + b"}}",
    ],
)
def test_show_prints_message_that_cannot_be_decoded(run: Run, ledger: LedgerBuilder, message: bytes) -> None:
    [dead_letter_id] = store(ledger, replace(MALFORMED, message=message))
    result = run("show", dead_letter_id)
    assert result.exit_code == 0, result.exception
    assert result.stdout.replace("\n", "").isprintable()
    assert "body, decoded" not in result.stdout
    assert json.loads(run("show", dead_letter_id, "--json").stdout)["body"] is None


def test_unknown_id_is_an_error(run: Run, ledger: LedgerBuilder) -> None:
    for command in ("show", "requeue", "delete"):
        result = run(command, "dl_none")
        assert result.exit_code == 1
        assert "payready:" in result.stderr


@pytest.mark.parametrize("letter", [READABLE, MALFORMED], ids=["readable", "malformed"])
def test_requeue_sends_the_same_bytes_and_deletes_the_row(
    run: Run, ledger: LedgerBuilder, redis: "Redis", letter: UnhandledMessage
) -> None:
    """On Redis a message of any form can be requeued: a later version may read it."""
    [dead_letter_id] = store(ledger, letter)
    assert json.loads(run("requeue", dead_letter_id, "--json").stdout) == {"requeued": 1, "refused": []}
    assert redis.lrange(letter.queue, 0, -1) == [letter.message]
    assert remaining(ledger) == []


def test_requeue_of_reason_sends_each_once(run: Run, ledger: LedgerBuilder, redis: "Redis") -> None:
    """Dead letters with other reasons stay."""
    store(ledger, *(replace(READABLE, message=b"%d" % number) for number in range(5)))
    [other] = store(ledger, MALFORMED)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("worker.flow.dead_lettering.PAGE_SIZE", 2)
        result = run("requeue", "--all-of-reason", "worker_died")
    assert result.stdout == "requeued 5 messages\n"
    assert sorted(redis.lrange("payments", 0, -1)) == [b"0", b"1", b"2", b"3", b"4"]
    assert remaining(ledger) == [other]


def test_requeue_requires_ids_or_a_reason(run: Run) -> None:
    assert run("requeue").exit_code == 2
    assert run("requeue", "dl_1", "--all-of-reason", "unreadable").exit_code == 2
    assert run("requeue", "--all-of-reason", "other").exit_code == 2


def test_cut_message_is_refused_and_the_others_are_requeued(run: Run, ledger: LedgerBuilder, redis: "Redis") -> None:
    too_long, readable = store(ledger, TOO_LONG, READABLE)
    assert "it cannot be requeued" in run("show", too_long).stdout
    result = run("requeue", too_long, readable)
    assert (result.exit_code, result.stdout) == (1, "requeued 1 message\n")
    assert f"{too_long} was not requeued: its message has 262145 bytes" in result.stderr
    assert redis.llen("refreshes") == 0
    assert redis.lrange("payments", 0, -1) == [READABLE.message]
    assert remaining(ledger) == [too_long]


def test_requeue_without_broker_keeps_the_dead_letter(
    run: Run, ledger: LedgerBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    [dead_letter_id] = store(ledger, READABLE)
    monkeypatch.setenv("PAYREADY_REDIS_URL", "redis://127.0.0.1:1/0")
    result = run("requeue", dead_letter_id)
    assert result.exit_code == 1
    assert "PAYREADY_BROKER_URL" in result.stderr
    assert remaining(ledger) == [dead_letter_id]


def test_requeue_that_redis_refuses_keeps_the_dead_letter(run: Run, ledger: LedgerBuilder, redis: "Redis") -> None:
    """Redis responds with an error, as it does when it is full or read-only."""
    [dead_letter_id] = store(ledger, READABLE)
    redis.set("payments", "not a list")
    result = run("requeue", dead_letter_id)
    assert result.exit_code == 1
    assert "payready:" in result.stderr
    assert remaining(ledger) == [dead_letter_id]


def test_message_dead_lettered_again_during_requeue_is_not_lost(
    run: Run, ledger: LedgerBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker stores the message again before `requeue` deletes it."""
    [dead_letter_id] = store(ledger, READABLE)
    send = message_requeue.MessageSender.send

    def send_and_store(sender: message_requeue.MessageSender, queue: str, message: bytes) -> None:
        send(sender, queue, message)
        store(ledger, READABLE)

    monkeypatch.setattr(message_requeue.MessageSender, "send", send_and_store)
    assert run("requeue", dead_letter_id).stdout == "requeued 1 message\n"
    assert remaining(ledger) == [dead_letter_id]


def test_interrupted_requeue_keeps_the_dead_letter(
    run: Run, ledger: LedgerBuilder, redis: "Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after the message was sent: it is there twice, never lost."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    [dead_letter_id] = store(ledger, READABLE)
    monkeypatch.setattr(flow, "delete_requeued_dead_letter", interrupt)
    assert run("requeue", dead_letter_id).exit_code != 0
    assert redis.llen("payments") == 1
    assert remaining(ledger) == [dead_letter_id]


def test_delete_removes_named_or_all(run: Run, ledger: LedgerBuilder) -> None:
    """Without ids and without --all nothing is deleted. --all asks for confirmation."""
    first, *_ = store(ledger, READABLE, MALFORMED, TOO_LONG)
    assert run("delete").exit_code == 2
    assert run("delete", first, "--all").exit_code == 2
    assert json.loads(run("delete", first, "--json").stdout) == {"deleted": 1}
    assert run("delete", "--all", typed="n\n").exit_code == 1
    assert len(remaining(ledger)) == 2
    assert run("delete", "--all", "--yes").stdout == "deleted 2 dead letters\n"
    assert remaining(ledger) == []


def test_doctor_warns_of_dead_letters(ledger: LedgerBuilder) -> None:
    """It names their number, the newest, and the command."""
    chosen = Settings(database_url=ledger.url)
    rt = build_runtime(chosen)
    context = CheckContext(settings=chosen, rt=rt, flower_url="", web_url="", dashboard_url="")

    def check() -> CheckResult:
        [result] = check_dead_letters(context)
        return result

    try:
        assert check().severity == Severity.OK
        store(ledger, READABLE)
        with transaction(ledger.engine) as tx:
            dead_letters.store(tx, [replace(MALFORMED, detail="body is missing")], utc_now())
        result = check()
    finally:
        rt.engine.dispose()
    assert result.severity == Severity.WARNING
    assert result.message.startswith("2 messages could not be processed; the newest, at ")
    assert result.message.endswith("from the queue refreshes: unreadable (body is missing)")
    assert "payready dead-letters list" in result.fix
