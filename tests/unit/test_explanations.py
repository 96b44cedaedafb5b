"""The sentence about a payment: each reason and state has one, and it names the party that must act."""

import itertools
import re
from typing import Any

import httpx
import pytest

from demo.processes import ROOT
from worker.errors import FailureReason
from worker.quiltt.messages import CONNECTION_LOST_EVENTS
from worker.quiltt.responses import refresh_error
from worker.rules import explanations
from worker.rules.explanations import explain
from worker.rules.failure_explanations import FAILURES, PAYMENT_IS_OVER
from worker.rules.payment_situations import Actor, PaymentSituation
from worker.rules.states import PaymentState, RefreshState

WAITING, RELEASED, FAILED = PaymentState.WAITING, PaymentState.RELEASED, PaymentState.FAILED
REASONS_PAGE = (ROOT / "docs/reference/failure-reasons.md").read_text()


def failed(reason: FailureReason, **known: Any) -> PaymentSituation:
    return PaymentSituation(state=FAILED, reason=reason, **known)


def test_every_failure_reason_waiting_state_and_verdict_is_explained() -> None:
    assert set(FAILURES) == set(FailureReason)
    assert set(explanations.WAITING) == {None, *RefreshState}
    assert set(explanations.RELEASES) == {"sufficient", "unchecked", "not_requested"}


def test_page_on_failure_reasons_names_the_party_that_must_act() -> None:
    """Each reason's row has the actor of its explanation in the column *must act*."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \| [^|]+ \|$", REASONS_PAGE, re.MULTILINE)
    assert dict(rows) == {reason.value: FAILURES[reason].actor.value for reason in FailureReason}


def test_every_explanation_is_one_sentence() -> None:
    flags = (
        *("is_deferred", "is_overdue", "has_unapplied_balance", "has_old_balance", "has_late_balance"),
        *("is_undelivered", "is_undeliverable"),
    )
    for chosen in itertools.product((False, True), repeat=len(flags)):
        known: dict[str, Any] = dict(zip(flags, chosen, strict=True))
        situations = [PaymentSituation(state=WAITING, refresh=refresh, **known) for refresh in (None, *RefreshState)]
        situations += [failed(reason, **known) for reason in FailureReason]
        situations += [PaymentSituation(state=RELEASED, verdict=verdict, **known) for verdict in explanations.RELEASES]
        for situation in situations:
            explained = explain(situation)
            assert re.fullmatch(r"(The|A) [^\n.]+; [^\n.]+\.", explained.sentence), explained.sentence
            assert len(explained.sentence.split()) <= 45, explained.sentence
            assert re.fullmatch(r"([A-Z`].*\.)?", explained.next_step), explained.next_step


@pytest.mark.parametrize(
    ("situation", "actor", "words"),
    [
        (failed(FailureReason.TIMEOUT, refresh=RefreshState.UNANSWERED), Actor.US, "Quiltt accepted its call, but no"),
        (failed(FailureReason.TIMEOUT, refresh=RefreshState.REJECTED), Actor.US, "no fresh balance arrived"),
        (failed(FailureReason.TIMEOUT, refresh=RefreshState.REQUESTED), Actor.US, "no call to Quiltt was made"),
        (failed(FailureReason.TIMEOUT, refresh=None), Actor.US, "no call to Quiltt was made"),
        (
            failed(FailureReason.TIMEOUT, refresh=RefreshState.ABANDONED, has_call=True),
            Actor.US,
            "no fresh balance arrived by its deadline",
        ),
        (
            failed(FailureReason.TIMEOUT, refresh=RefreshState.ANSWERED, has_old_balance=True),
            Actor.US,
            "the balance that arrived was too old",
        ),
        (
            failed(FailureReason.TIMEOUT, refresh=RefreshState.UNANSWERED, has_late_balance=True),
            Actor.US,
            "its balance arrived only after its deadline",
        ),
        (
            failed(FailureReason.TIMEOUT, refresh=RefreshState.UNCERTAIN),
            Actor.US,
            "response to its call to Quiltt was lost",
        ),
        (PaymentSituation(state=WAITING, refresh=RefreshState.ACCEPTED), Actor.QUILTT, "send the balance"),
        (PaymentSituation(state=WAITING, refresh=RefreshState.REQUESTED), Actor.NONE, "is not made yet"),
        (
            PaymentSituation(state=WAITING, refresh=RefreshState.REQUESTED, is_deferred=True),
            Actor.QUILTT,
            "has not accepted the call",
        ),
        (
            PaymentSituation(state=WAITING, refresh=RefreshState.ACCEPTED, has_unapplied_balance=True),
            Actor.NONE,
            "payready applies it",
        ),
        (PaymentSituation(state=WAITING, refresh=RefreshState.ACCEPTED, is_overdue=True), Actor.US, "`beat`"),
        (
            PaymentSituation(state=RELEASED, verdict="sufficient", is_undelivered=True, has_open_hold=True),
            Actor.NONE,
            "its outcome is not delivered yet, which keeps its funds hold open",
        ),
        (
            PaymentSituation(state=RELEASED, verdict="sufficient", is_undeliverable=True),
            Actor.US,
            "redeliver the outcome",
        ),
        (failed(FailureReason.INSUFFICIENT_FUNDS), Actor.PAYER, "do not cover it"),
        (failed(FailureReason.CANCELLED), Actor.NONE, "no action is needed"),
    ],
)
def test_explanation_depends_on_the_situation(situation: PaymentSituation, actor: Actor, words: str) -> None:
    explained = explain(situation)
    assert (explained.actor, words in explained.sentence) == (actor, True), explained.sentence


def test_undelivered_failure_keeps_its_actor() -> None:
    """The payer must still act, and payready delivers the outcome by itself."""
    explained = explain(failed(FailureReason.CONNECTION_INACTIVE, is_undelivered=True))
    assert explained.actor == Actor.PAYER
    assert "its outcome is not delivered yet; the payer must act: connect the account again." in explained.sentence


@pytest.mark.parametrize(("event", "detail"), CONNECTION_LOST_EVENTS.items())
def test_lost_connection_names_the_party_of_its_event(event: str, detail: str) -> None:
    actors = {"repairable": Actor.PAYER, "disconnected": Actor.PAYER, "deleted": Actor.US}
    expected = actors.get(event.rpartition(".")[2], Actor.QUILTT)
    assert explain(failed(FailureReason.CONNECTION_LOST, detail=detail)).actor == expected


def rejected_by(status: int) -> str:
    return str(refresh_error(httpx.Response(status)))


@pytest.mark.parametrize(
    ("reason", "detail", "cause", "actor"),
    [
        (
            FailureReason.ACCOUNT_UNSUPPORTED,
            rejected_by(400),
            "Quiltt does not refresh accounts of this kind",
            Actor.PAYER,
        ),
        (FailureReason.ACCOUNT_UNSUPPORTED, "the account is of kind LOAN", "the account is of kind LOAN", Actor.PAYER),
        (FailureReason.NOT_AUTHORIZED, rejected_by(401), "Quiltt does not accept our API key", Actor.US),
        (
            FailureReason.NOT_AUTHORIZED,
            "the API key is a production key; set PAYREADY_ALLOW_PRODUCTION_KEY to use it outside production",
            "this deployment may not use its API key, which is a production key",
            Actor.US,
        ),
        (
            FailureReason.PROVIDER_UNAVAILABLE,
            rejected_by(418),
            "Quiltt rejected its call: Quiltt responded with HTTP 418, which is not documented",
            Actor.QUILTT,
        ),
        (
            FailureReason.PROVIDER_UNAVAILABLE,
            rejected_by(503),
            "the calls to Quiltt failed until its deadline: Quiltt responded with HTTP 503",
            Actor.QUILTT,
        ),
        (
            FailureReason.CONNECTION_LOST,
            CONNECTION_LOST_EVENTS["connection.disconnected"],
            "the account's bank connection was lost while the payment waited: the connection was disconnected",
            Actor.PAYER,
        ),
        (
            FailureReason.CONNECTION_LOST,
            CONNECTION_LOST_EVENTS["connection.synced.errored.institution"],
            (
                "the account's bank connection was lost while the payment waited: "
                "the connection is in error: the institution fails"
            ),
            Actor.QUILTT,
        ),
        (
            FailureReason.PROVIDER_UNAVAILABLE,
            "no connection to Quiltt: connect error",
            "the calls to Quiltt failed until its deadline: no connection to Quiltt: connect error",
            Actor.US,
        ),
        (
            FailureReason.PROVIDER_UNAVAILABLE,
            "the worker stopped during the call",
            "the calls to Quiltt failed until its deadline: the worker stopped during the call",
            Actor.US,
        ),
        (
            FailureReason.PROVIDER_UNAVAILABLE,
            "no response from Quiltt: read timeout",
            "the calls to Quiltt failed until its deadline: no response from Quiltt: read timeout",
            Actor.QUILTT,
        ),
        (
            FailureReason.PROVIDER_UNAVAILABLE,
            "calls to Quiltt fail; no call is made before 2026-11-22T12:00:05Z",
            "calls to Quiltt fail, and the circuit breaker stops them: no call is made before 2026-11-22T12:00:05Z",
            Actor.QUILTT,
        ),
        (
            FailureReason.CONNECTION_LOST,
            "the connection was disconnected: the user must connect again",  # as version 0.2.0 wrote it
            "the account's bank connection was lost while the payment waited: the connection was disconnected",
            Actor.PAYER,
        ),
        (
            FailureReason.CANCELLED,
            "its Celery task was revoked",
            "it was cancelled: its Celery task was revoked",
            Actor.NONE,
        ),
    ],
)
def test_reason_with_several_causes_names_the_one_that_happened(
    reason: FailureReason, detail: str, cause: str, actor: Actor
) -> None:
    explained = explain(failed(reason, detail=detail))
    assert (explained.happened, explained.actor) == (f"The payment failed because {cause}", actor)


def test_failed_payment_is_over_and_a_conflict_is_not_its_payment() -> None:
    """The next step says so for each reason, and whether a new job is needed."""
    for reason in FailureReason:
        explained = explain(failed(reason))
        assert explained.next_step.endswith(PAYMENT_IS_OVER) == (reason != FailureReason.CONFLICT)
        assert "new payment id" in f"{explained.sentence} {explained.next_step}"


def test_documents_that_next_steps_name_exist() -> None:
    situations = [failed(reason) for reason in FailureReason] + [
        failed(FailureReason.TIMEOUT, refresh=RefreshState.UNANSWERED)
    ]
    named = set(re.findall(r"docs/[\w/.-]+\.md", " ".join(explain(situation).next_step for situation in situations)))
    assert len(named) >= 5
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []
