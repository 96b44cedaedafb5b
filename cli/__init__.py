"""The command `payready`."""

from time import monotonic

from config.garbage_collection import raise_gc_thresholds

STARTED_AT = monotonic()
"""Time of the monotonic clock before the first import of the command, which may take seconds on a slow host."""
raise_gc_thresholds()  # a tenth of the time of the imports
