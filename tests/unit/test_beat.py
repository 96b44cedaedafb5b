"""The beat sends each task on time, and sleeps in between."""

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
    """Create an app with payready's schedule and a clock that only `slept` moves."""
    with Celery("beat", set_as_current=False) as app:
        app.conf.update(celery_settings(Settings()))
        monkeypatch.setattr(app, "now", lambda: clock(app))
        app.slept = timedelta(0)
        yield app


def clock(app: Any) -> datetime:
    """Return the current time of the app."""
    now: datetime = NOON + app.slept
    return now


def run_ticks(app: Any, scheduler: Callable[[Celery], Any]) -> list[tuple[float, str | None]]:
    """Run a beat for 5 s, up to 500 ticks; return the time and the task sent of each tick."""
    ticks: list[tuple[float, str | None]] = []
    sent: list[str] = []
    beat = scheduler(app)
    beat.producer = None  # without this, the beat connects to a broker
    beat.apply_entry = lambda entry, **_: sent.append(entry.task)
    while app.slept < timedelta(seconds=5.5) and len(ticks) < 500:
        interval = beat.tick()
        ticks.append((app.slept.total_seconds(), sent.pop() if sent else None))
        if interval and interval > 0:
            app.slept += timedelta(seconds=interval)
    return ticks


def test_beat_sends_each_task_on_time_and_sleeps_until_the_next(app: Celery) -> None:
    """The beat needs one tick for each task sent, and one to find that no task is due."""
    ticks = run_ticks(app, Scheduler)
    for task in ("payments.expire", "payments.sweep"):
        at = [when for when, sent in ticks if sent == task]
        assert at == pytest.approx([1, 2, 3, 4, 5], abs=0.001)
    assert len(ticks) <= 4 * 6


def test_beat_role_runs_payready_scheduler() -> None:
    command = shlex.split(procfile()["beat"])
    assert symbol_by_name(command[command.index("--scheduler") + 1]) is Scheduler


def test_celery_scheduler_polls_in_the_last_hundredth_of_a_second(app: Celery) -> None:
    """The scheduler of payready avoids this. If this test fails, the scheduler is obsolete.

    The clock does not advance, so Celery's scheduler ticks without a sleep.
    """
    assert len(run_ticks(app, CeleryScheduler)) == 500
