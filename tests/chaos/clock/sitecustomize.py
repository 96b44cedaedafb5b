"""Clock of one replica in a chaos test, which deviates by `CHAOS_SKEW_S`. Python imports this file automatically.

Libraries such as libfaketime change the time of the whole process, which also breaks sleeping. payready and Celery read
the time only through the two functions that are replaced here.
"""

import os
import time
from datetime import datetime, timedelta, tzinfo

SKEW = timedelta(seconds=float(os.environ.get("CHAOS_SKEW_S", "0")))

_true_time = time.time


class _Clock(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + SKEW


if SKEW:
    time.time = lambda: _true_time() + SKEW.total_seconds()  # before other modules import it by name

    import worker.runtime

    vars(worker.runtime)["datetime"] = _Clock
