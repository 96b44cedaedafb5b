"""Python's garbage collector, set for processes that load much once and then serve for weeks.

As Python sets it, it goes again and again through all that was loaded at the start, while the process serves: for up to
half a second, in which nothing else runs.
"""

import gc

THRESHOLDS = (10_000, 10, 10)
"""Objects that were made and not freed before the youngest of them are gone through (Python: 700), and how often that
is done before the next older ones are."""


def collect_seldom() -> None:
    """Let the collector wait for more to do. What no cycle holds is freed at once, as ever."""
    gc.set_threshold(*THRESHOLDS)


def spare_what_is_loaded() -> None:
    """Never again go through what is there now: modules, classes and clients stay as long as the process."""
    gc.collect()
    gc.freeze()
