"""The audit of actions: no action of a user begins before its request is committed, and each result is recorded."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from config.log_config import get_logger
from dashboard.access.users import User
from worker.errors import error_summary
from worker.ledger import audit
from worker.ledger.engine import DATABASE_UNAVAILABLE, transaction
from worker.runtime import Runtime

log = get_logger(__name__)
T = TypeVar("T")


def audited(
    runtime: Runtime,
    user: User,
    *,
    action: str,
    subject: str,
    do: Callable[[], T],
    detail: Mapping[str, Any] | None = None,
    result: Callable[[T], str] = str,
) -> T:
    """Record an action, do it, record its result, and return what `do` returned. Blocks: call it in a thread.

    `action`: a fixed name, `noun.verb`, such as `payment.cancel`. `subject`: the id of what it changes. `detail`:
    further facts of the request, without secrets. `result`: gives the text of the result, by default the code that `do`
    returned, such as `cancelled` or `already_resolved`. All texts may be hostile.

    An error of `do` is recorded as `failed: ClassName`, and raised. If the ledger cannot record the request, its error
    is raised and nothing is done. If it cannot record the result, the action stays done, and the entry has no result.
    """
    with transaction(runtime.engine) as tx:
        audit_id = audit.record_requested(
            tx, user_name=user.name, action=action, subject=subject, detail=detail, now=runtime.clock()
        )
    try:
        done = do()
    except Exception as error:
        _record_result(runtime, audit_id, f"failed: {type(error).__name__}")
        raise
    _record_result(runtime, audit_id, result(done))
    return done


def _record_result(runtime: Runtime, audit_id: int, text: str) -> None:
    log.info("audit.action_ended", audit_id=audit_id, result=audit.stored_text(text))
    try:
        with transaction(runtime.engine) as tx:
            audit.record_result(tx, audit_id, text, runtime.clock())
    except DATABASE_UNAVAILABLE as error:
        log.error("audit.result_not_recorded", audit_id=audit_id, error=error_summary(error))
