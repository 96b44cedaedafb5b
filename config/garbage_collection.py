"""Tune Python's garbage collector: for long-running processes, and for commands, which spend their time in imports.

With Python's defaults the collector scans all objects loaded at the start again and again. Each scan stops all threads
of the process for up to half a second.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLDS = (10_000, 10, 10)
"""Net allocations before a scan of the youngest generation (Python's default: 700), then scans of one generation before
a scan of the next older one."""


def raise_gc_thresholds() -> None:
    """Collect less often. Reference counting still frees objects without cycles at once."""
    gc.set_threshold(*THRESHOLDS)


def collect_and_freeze_objects() -> None:
    """Exclude all objects that exist now from later scans: modules, classes and clients live as long as the process."""
    gc.collect()
    gc.freeze()


@contextmanager
def freeze_imported_objects() -> Iterator[None]:
    """Import modules without a collection, and exclude their objects from later ones.

    Python collects at its exit, too. With the modules of a command, these scans take a third of its CPU time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
