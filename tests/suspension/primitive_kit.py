"""A primitive, which is a use of a task's result, and the factory of the signatures that it consists of.

Notes are tasks of the payments service that record their calls.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from celery import Celery
from celery.canvas import Signature

Outcome = str
RELEASED, FAILED = "released", "failed"


@dataclass
class Kit:
    """Factory of the signatures of a primitive. `task` is payready's task or the plain one."""

    app: Celery
    task: str
    queue: str
    account_id: str
    tag: str
    fails: bool
    payments: list[str] = field(default_factory=list)
    """Ids of the payments that start without the outcome of another one."""

    def note(self, mark: str, *, returns: Any = None, args: tuple[Any, ...] = (), **options: Any) -> Signature:
        """Return a task of the payments service that records its call."""
        kwargs = {"tag": self.tag, "mark": mark, "returns": returns}
        return self.app.signature("ledger.note", args=args, kwargs=kwargs, **{"queue": "svc", **_listed(options)})

    def new_style(self, mark: str) -> Signature:
        """Return an errback that is called with the request, the error and the traceback."""
        return self.app.signature("hooks.new_style", kwargs={"tag": self.tag, "mark": mark}, queue="svc")

    def job(self, mark: str = "pay", *, may_fail: bool = True, starts_later: bool = False) -> dict[str, Any]:
        """Return the arguments of a payment."""
        payment_id = f"{self.tag}/{mark}"
        if not starts_later:
            self.payments.append(payment_id)
        amount = "9999.00" if may_fail and self.fails else "0.01"
        return {
            "payment_id": payment_id,
            "account_id": self.account_id,
            "amount": amount,
            "timeout_s": 100,
            "max_balance_age_s": 600,
        }

    def pay(self, mark: str = "pay", *, may_fail: bool = True, starts_later: bool = False, **options: Any) -> Signature:
        """Return a payment. It fails if `fails` and `may_fail` are true."""
        return self.initiate(kwargs=self.job(mark, may_fail=may_fail, starts_later=starts_later), **options)

    def initiate(self, **options: Any) -> Signature:
        """Return a payment. Without arguments its job is the result of the previous task."""
        return self.app.signature(self.task, **{"queue": self.queue, **_listed(options)})


def _listed(options: dict[str, Any]) -> dict[str, Any]:
    """Put a callback into a list, as `Signature.link` does. Celery ignores a bare callback in some places."""
    return {
        name: [value] if name in ("link", "link_error") and isinstance(value, Signature) else value
        for name, value in options.items()
    }


@dataclass(frozen=True)
class Primitive:
    """A use of a payment, and the notes that it calls."""

    name: str
    build: Callable[[Kit], Signature]
    has_result: bool
    released: frozenset[str]
    failed: frozenset[str]
    once: frozenset[str]
    """Notes that are called once even if the outcomes are delivered twice."""
    first: frozenset[str]
    """Notes that are called before a payment waits, or beside it."""
    joined: frozenset[str]
    """Tasks that follow several others. The last of these is their parent."""
    hangs: bool = False
    """Celery itself leaves the last result pending when a task before it fails."""
    payments: frozenset[str] = frozenset(("pay", "good", "third", "then", "deep"))

    def expected(self, outcome: Outcome) -> frozenset[str]:
        """Return exactly the notes that must be called."""
        return self.released if outcome == RELEASED else self.failed

    def before(self, outcome: Outcome) -> frozenset[str]:
        """Return the notes that are called before a payment waits."""
        return self.first & self.expected(outcome)
