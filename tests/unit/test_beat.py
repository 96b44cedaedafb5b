"""The scheduler of `beat` sends tasks on time and sleeps in between."""

import shlex
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from celery.beat import Scheduler as CeleryScheduler
from kombu.utils.imports import symbol_by_name

from config.celery_config import celery_settings
from config.settings import Settings
from demo.processes import procfile
from tasks.beat import Scheduler

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """Return an app with payready's schedule, whose clock advances only while the scheduler sleeps."""
    with Celery("beat-test", set_as_current=False) as app:
        app.conf.update(celery_settings(Settings()))
        monkeypatch.setattr(app, "now", lambda: clock(app))
        app.slept = timedelta(0)
        yield app


def clock(app: Any) -> datetime:
    """Return the time of the app."""
    now: datetime = NOON + app.slept
    return now


def cycles(app: Any, scheduler: Callable[[Celery], Any]) -> list[tuple[float, str | None]]:
    """Run `beat` for 5.5 s or 500 cycles. Return the time of each cycle and the task that it sent."""
    done: list[tuple[float, str | None]] = []
    sent: list[str] = []
    beat = scheduler(app)
    beat.producer = None  # no connection to a broker
    beat.apply_entry = lambda entry, **_: sent.append(entry.task)
    while app.slept < timedelta(seconds=5.5) and len(done) < 500:
        interval = beat.tick()
        done.append((app.slept.total_seconds(), sent.pop() if sent else None))
        if interval and interval > 0:
            app.slept += timedelta(seconds=interval)
    return done


def test_scheduler_sleeps_until_the_next_task(app: Celery) -> None:
    """One cycle per task, and one that finds no due task."""
    done = cycles(app, Scheduler)
    for task in ("payments.expire", "payments.sweep"):
        at = [when for when, sent in done if sent == task]
        assert at == pytest.approx([1, 2, 3, 4, 5], abs=0.001)
    assert len(done) <= 4 * 6


def test_role_beat_uses_the_scheduler() -> None:
    command = shlex.split(procfile()["beat"])
    assert symbol_by_name(command[command.index("--scheduler") + 1]) is Scheduler


def test_celery_scheduler_still_polls_for_the_last_10_ms(app: Celery) -> None:
    """When this fails, the scheduler is no longer needed. The clock of this test does not advance."""
    assert len(cycles(app, CeleryScheduler)) == 500
