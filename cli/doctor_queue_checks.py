"""Check of `payready doctor`: lists on the broker with messages that no worker fetches."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cli import celery_client
from cli.doctor_results import CheckContext, CheckResult, error, ok, warning
from config.celery_config import QUEUES, celery_settings
from config.redis_addresses import is_redis_address
from config.settings import Settings
from tasks.broker_lists import IdleList, ListSearch
from tasks.celery_errors import CeleryUnavailable
from worker.ledger import outcome_deliveries
from worker.ledger.engine import DATABASE_UNAVAILABLE, read_snapshot
from worker.rules.decimals import count_text

CHECK = "unread lists"
MAX_RESULTS = 20
MAX_SHOWN_CHARACTERS = 80
"""Maximum characters of a list's name that are shown: other apps choose the names."""
_LIST = re.compile(
    r"(?P<prefix>.*?)(?P<instance>([a-z0-9-]{1,32}\.)?)"
    rf"(?P<queue>{'|'.join(QUEUES)})((?P<separator>\D+)(?P<step>\d))?",
    re.DOTALL,
)
_GUIDE = "see docs/howto/integrate-a-payments-service.md#agree-on-broker-options"


@dataclass(frozen=True, kw_only=True)
class _ListName:
    """The parts of the name of a list that has the name of a queue of payready."""

    prefix: str
    instance_prefix: str
    queue: str
    separator: str | None
    step: str | None


def check_unread_lists(context: CheckContext) -> Iterator[CheckResult]:
    """Check that no jobs and no callbacks of payready are in lists that no worker reads."""
    if not is_redis_address(context.settings.effective_broker_url):
        return
    try:
        search = celery_client.search_idle_lists(context.settings)
    except CeleryUnavailable:
        return  # check_broker_and_workers reports it
    problems = [found for idle in search.idle_lists for found in _results_of_list(context, idle)]
    yield from problems[:MAX_RESULTS]
    if len(problems) > MAX_RESULTS:
        yield error(CHECK, f"{len(problems) - MAX_RESULTS} more lists", _GUIDE)
    yield from _results_of_search(search, has_problems=bool(problems))


def _results_of_search(search: ListSearch, *, has_problems: bool) -> Iterator[CheckResult]:
    if not search.is_complete:
        message = f"searched the first {search.searched_keys} keys of the broker's database: it has more keys or lists"
        yield warning(CHECK, message, "give payready a database of its own: PAYREADY_BROKER_URL")
    elif not has_problems:
        yield ok(CHECK, "no job and no callback is in a list that no worker reads")


def _results_of_list(context: CheckContext, idle: IdleList) -> Iterator[CheckResult]:
    """Yield an error for jobs of payready, and a warning for callbacks that payready sent."""
    ours = idle.task_names & set(celery_settings(context.settings)["task_routes"])
    content = f"{count_text(idle.length, 'message')} in the list {_shown(idle.key)}"
    if ours:
        message = f"{content}, which no worker of payready reads: {', '.join(sorted(ours))}"
        name = _parse_list_name(context.settings, idle.key)
        is_own = name is None or name.instance_prefix == context.settings.name_prefix
        # The workers of another instance do not respond to this one.
        yield (error if is_own else warning)(CHECK, message, fix_of_misplaced_jobs(context.settings, idle.key))
    elif _sent_by_payready(context, idle):
        yield warning(
            CHECK,
            f"{content}, which no worker reads: callbacks of payments",
            f"name a queue in each callback, start the service's worker, and compare its broker options; {_GUIDE}",
        )


def _sent_by_payready(context: CheckContext, idle: IdleList) -> bool:
    if not idle.parent_ids:
        return False
    try:
        with read_snapshot(context.rt.engine) as tx:
            return bool(outcome_deliveries.payments_of_tasks(tx, sorted(idle.parent_ids)))
    except DATABASE_UNAVAILABLE:
        return False  # check_database reports it


def fix_of_misplaced_jobs(settings: Settings, key: str) -> str:
    """Return which setting, or which option of the sender, makes payready read the jobs of a list."""
    name = _parse_list_name(settings, key)
    if name is None:
        queue = f"{settings.name_prefix}payments"
        return f'the sender named another queue: send the jobs with queue="{queue}", and move these with LMOVE'
    differences = [
        _queue_difference(name, settings),
        _difference("global_keyprefix", name.prefix, "BROKER_KEY_PREFIX", settings.broker_key_prefix),
        _difference("sep", name.separator, "BROKER_PRIORITY_SEPARATOR", settings.broker_priority_separator),
        _step_difference(name.step, settings),
    ]
    named = " and ".join(difference for difference in differences if difference)
    return f"probably the sender has {named}: use the same on both sides, unless another payready reads it; {_GUIDE}"


def _parse_list_name(settings: Settings, key: str) -> _ListName | None:
    """Return the parts of a list's name, or None if it has the name of no queue of payready."""
    known_prefix = settings.broker_key_prefix if key.startswith(settings.broker_key_prefix) else ""
    name = _LIST.fullmatch(key.removeprefix(known_prefix))
    if name is None:
        return None
    return _ListName(
        prefix=f"{known_prefix}{name['prefix']}",
        instance_prefix=name["instance"],
        queue=name["queue"],
        separator=name["separator"],
        step=name["step"],
    )


def _queue_difference(name: _ListName, settings: Settings) -> str | None:
    if name.instance_prefix == settings.name_prefix:
        return None
    ours = f"{settings.name_prefix}{name.queue}"
    setting = f"PAYREADY_INSTANCE is {settings.instance}" if settings.instance else "PAYREADY_INSTANCE is not set"
    return f'queue="{name.instance_prefix}{name.queue}", and {setting}, so that the queue is "{ours}"'


def _difference(option: str, theirs: str | None, setting: str, ours: str) -> str | None:
    if theirs is None or theirs == ours:
        return None
    return f"{option}={_shown(theirs)!r}, and PAYREADY_{setting} is {_shown(ours)!r}".replace("\\\\", "\\")


def _step_difference(step: str | None, settings: Settings) -> str | None:
    if step is None or int(step) in settings.broker_priority_steps:
        return None
    steps = ",".join(map(str, settings.broker_priority_steps))
    return f"priority_steps with {step}, and PAYREADY_BROKER_PRIORITY_STEPS is {steps}"


def _shown(name: str) -> str:
    """Return a name with escapes for control characters, cut to `MAX_SHOWN_CHARACTERS`."""
    return name.encode("unicode_escape").decode()[:MAX_SHOWN_CHARACTERS]
