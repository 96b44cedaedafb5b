"""The beat sends what is due when it is due, and sleeps in between."""

import shlex
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from celery.beat import Scheduler as Theirs
from kombu.utils.imports import symbol_by_name

from config.celery_config import celery_settings
from config.settings import Settings
from demo.processes import procfile
from tasks.beat import Scheduler

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """An app whose clock stands still unless someone sleeps, with payready's schedule and tasks that are not sent."""
    with Celery("beaten", set_as_current=False) as app:
        app.conf.update(celery_settings(Settings()))
        monkeypatch.setattr(app, "now", lambda: clock(app))
        app.slept = timedelta(0)
        yield app


def clock(app: Any) -> datetime:
    """What time it is to the app."""
    now: datetime = NOON + app.slept
    return now


def turns(app: Any, scheduler: Callable[[Celery], Any]) -> list[tuple[float, str | None]]:
    """Five seconds of a beat's life: when it woke, and what it sent then; cut off after 500 turns."""
    done: list[tuple[float, str | None]] = []
    sent: list[str] = []
    beat = scheduler(app)
    beat.producer = None  # else it would connect to a broker
    beat.apply_entry = lambda entry, **_: sent.append(entry.task)
    while app.slept < timedelta(seconds=5.5) and len(done) < 500:
        interval = beat.tick()
        done.append((app.slept.total_seconds(), sent.pop() if sent else None))
        if interval and interval > 0:
            app.slept += timedelta(seconds=interval)
    return done


def test_scheduler_sleeps_until_the_next_task(app: Celery) -> None:
    """One cycle per task, and one that finds no due task."""
    done = turns(app, Scheduler)
    for task in ("payments.expire", "payments.sweep"):
        at = [when for when, sent in done if sent == task]
        assert at == pytest.approx([1, 2, 3, 4, 5], abs=0.001)
    assert len(done) <= 4 * 6


def test_role_beat_uses_the_scheduler() -> None:
    command = shlex.split(procfile()["beat"])
    assert symbol_by_name(command[command.index("--scheduler") + 1]) is Scheduler


def test_celery_scheduler_still_polls_for_the_last_10_ms(app: Celery) -> None:
    """When this fails, the scheduler is no longer needed. The clock of this test does not advance."""
    assert len(turns(app, Theirs)) == 500
