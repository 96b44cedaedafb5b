"""Every use of a task's result continues as if the task had not waited."""

import pytest

from demo.processes import ROOT
from tests.suspension.primitive_kit import FAILED, RELEASED, Outcome, Primitive
from tests.suspension.primitive_runs import Run
from tests.suspension.primitives import PRIMITIVES

pytestmark = pytest.mark.slow


each_primitive = pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda primitive: primitive.name)
each_outcome = pytest.mark.parametrize("outcome", [RELEASED, FAILED])


@each_outcome
@each_primitive
def test_suspended_task_behaves_like_a_plain_task(runs: dict[str, Run], primitive: Primitive, outcome: Outcome) -> None:
    """Its calls, relations and results equal those of a plain Celery task with the same outcome."""
    calls = runs["suspended"].calls(primitive, outcome)
    assert sorted(note["mark"] for note in calls) == sorted(primitive.expected(outcome))
    assert runs["suspended"].trace(primitive, outcome) == runs["plain"].trace(primitive, outcome)


@each_outcome
@each_primitive
def test_suspended_task_survives_crashes_and_redelivery(
    crashed: Run, runs: dict[str, Run], primitive: Primitive, outcome: Outcome
) -> None:
    """After a redelivery each callback has the same id, and a chord's body runs once."""
    calls = crashed.calls(primitive, outcome)
    ids = {(note["mark"], note["id"]) for note in calls}
    assert sorted(mark for mark, _ in ids) == sorted(primitive.expected(outcome))
    assert len([note for note in calls if note["mark"] in primitive.once]) == len(
        primitive.once & primitive.expected(outcome)
    )
    assert crashed.trace(primitive, outcome) == runs["plain"].trace(primitive, outcome)


def test_documentation_lists_every_primitive() -> None:
    """The table is in `docs/reference/celery-compatibility.md`."""
    text = (ROOT / "docs" / "reference" / "celery-compatibility.md").read_text()
    table = text[text.index("| Primitive |") :].partition("\n\n")[0].splitlines()[2:]
    assert [line.split("|")[1].strip() for line in table] == [primitive.name for primitive in PRIMITIVES]
