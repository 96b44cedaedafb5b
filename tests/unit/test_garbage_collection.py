"""Garbage collection: loaded objects are frozen when a role is ready, and when a command is imported."""

import json
import subprocess
import sys

from config.garbage_collection import THRESHOLDS
from demo.processes import ROOT

READY = """
import gc, json, sys
from tasks.app import app
app.finalize()
from celery import signals
getattr(signals, sys.argv[1]).send(sender=None)
print(json.dumps([gc.get_threshold(), gc.get_freeze_count(), len(gc.get_objects())]))
"""


def test_worker_and_beat_freeze_loaded_objects() -> None:
    """The collector runs less often, and only over objects that were created after the start."""
    for signal in ("worker_ready", "beat_init"):
        done = subprocess.run(
            [sys.executable, "-c", READY, signal], cwd=ROOT, capture_output=True, check=True, timeout=60
        )
        thresholds, frozen, left = json.loads(done.stdout)
        assert tuple(thresholds) == THRESHOLDS
        assert frozen > 10_000 > left


COMMAND = """
import gc, json, typer
from cli.main import app
payment = typer.main.get_command(app).load("payment")
before = gc.get_stats()
payment.load("list")
print(json.dumps([before == gc.get_stats(), gc.isenabled(), gc.get_freeze_count(), len(gc.get_objects())]))
"""


def test_import_of_a_command_needs_no_collection_then_or_later() -> None:
    """Its objects are frozen, so that neither the command nor Python's exit scans them."""
    done = subprocess.run([sys.executable, "-c", COMMAND], cwd=ROOT, capture_output=True, check=True, timeout=60)
    has_not_collected, is_enabled, frozen, left = json.loads(done.stdout)
    assert has_not_collected
    assert is_enabled
    assert frozen > 10_000 > left
