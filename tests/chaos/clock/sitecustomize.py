"""The clock of one replica in a storm: off by `STORM_SKEW_S`. Python imports this by itself, from `PYTHONPATH`.

A library that deceives the whole process, as libfaketime, also breaks sleeping in it; what payready and Celery read of
the time are these two.
"""

import os
import time
from datetime import datetime, timedelta, tzinfo

SKEW = timedelta(seconds=float(os.environ.get("STORM_SKEW_S", "0")))

_true_time = time.time


class _Clock(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + SKEW


if SKEW:
    time.time = lambda: _true_time() + SKEW.total_seconds()  # before anyone imports it by name

    import worker.runtime

    vars(worker.runtime)["datetime"] = _Clock
