"""The sentence about a payment: each reason and state has one, and it names the party that must act."""

import itertools
import re
from typing import Any

import pytest

from demo.processes import ROOT
from worker.errors import FailureReason
from worker.quiltt.messages import CONNECTION_LOST_EVENTS
from worker.rules import explanations
from worker.rules.explanations import Actor, PaymentSituation, explain
from worker.rules.states import PaymentState, RefreshState

WAITING, RELEASED, FAILED = PaymentState.WAITING, PaymentState.RELEASED, PaymentState.FAILED
REASONS_PAGE = (ROOT / "docs/reference/failure-reasons.md").read_text()


def failed(reason: FailureReason, **known: Any) -> PaymentSituation:
    return PaymentSituation(state=FAILED, reason=reason, **known)


def test_every_failure_reason_waiting_state_and_verdict_is_explained() -> None:
    assert set(explanations.FAILURES) == set(FailureReason)
    assert set(explanations.WAITING) == {None, *RefreshState}
    assert set(explanations.RELEASES) == {"sufficient", "unchecked", "not_requested"}


def test_page_on_failure_reasons_names_the_party_that_must_act() -> None:
    """Each reason's row has the actor of its explanation in the column *must act*."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \| [^|]+ \|$", REASONS_PAGE, re.MULTILINE)
    assert dict(rows) == {reason.value: explanations.FAILURES[reason].actor.value for reason in FailureReason}


def test_every_explanation_is_one_sentence() -> None:
    flags = ("is_deferred", "is_overdue", "has_unapplied_balance", "has_old_balance", "is_undelivered")
    for chosen in itertools.product((False, True), repeat=len(flags)):
        known: dict[str, Any] = dict(zip(flags, chosen, strict=True))
        situations = [PaymentSituation(state=WAITING, refresh=refresh, **known) for refresh in (None, *RefreshState)]
        situations += [failed(reason, **known) for reason in FailureReason]
        situations += [PaymentSituation(state=RELEASED, verdict=verdict, **known) for verdict in explanations.RELEASES]
        for situation in situations:
            sentence = explain(situation).sentence
            assert re.fullmatch(r"(The|A) [^\n.]+; [^\n.]+\.", sentence), sentence
            assert len(sentence.split()) <= 45, sentence


@pytest.mark.parametrize(
    ("situation", "actor", "words"),
    [
        (failed(FailureReason.TIMEOUT, refresh=RefreshState.UNANSWERED), Actor.US, "no fresh balance arrived"),
        (failed(FailureReason.TIMEOUT, refresh=RefreshState.REQUESTED), Actor.US, "no call to Quiltt was made"),
        (failed(FailureReason.TIMEOUT, refresh=None), Actor.US, "no call to Quiltt was made"),
        (
            failed(FailureReason.TIMEOUT, refresh=RefreshState.ANSWERED, has_old_balance=True),
            Actor.US,
            "the balance that arrived was too old",
        ),
        (failed(FailureReason.TIMEOUT, refresh=RefreshState.UNCERTAIN, has_pending_call=True), Actor.US, "is pending"),
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
