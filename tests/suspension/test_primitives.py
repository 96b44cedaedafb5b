"""Whatever is done with a task's result goes on as if the task had never waited."""

import pytest

from demo.processes import ROOT
from tests.suspension.primitive_runs import Run
from tests.suspension.primitives import FAILED, PRIMITIVES, RELEASED, Outcome, Primitive

pytestmark = pytest.mark.slow


each_primitive = pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda primitive: primitive.name)
each_outcome = pytest.mark.parametrize("outcome", [RELEASED, FAILED])


@each_outcome
@each_primitive
def test_goes_on_as_a_task_that_never_waited(runs: dict[str, Run], primitive: Primitive, outcome: Outcome) -> None:
    """The same calls, with the same relations, and the same results as of a plain Celery task with that outcome."""
    calls = runs["calm"].calls(primitive, outcome)
    assert sorted(note["mark"] for note in calls) == sorted(primitive.expected(outcome))
    assert runs["calm"].trace(primitive, outcome) == runs["twin"].trace(primitive, outcome)


@each_outcome
@each_primitive
def test_goes_on_after_crashes_and_a_repeat_shows_as_one(
    crashed: Run, runs: dict[str, Run], primitive: Primitive, outcome: Outcome
) -> None:
    """After crashes all goes on the same; told twice, each callback has the same id, and a chord's body runs once."""
    calls = crashed.calls(primitive, outcome)
    ids = {(note["mark"], note["id"]) for note in calls}
    assert sorted(mark for mark, _ in ids) == sorted(primitive.expected(outcome))
    assert len([note for note in calls if note["mark"] in primitive.once]) == len(
        primitive.once & primitive.expected(outcome)
    )
    assert crashed.trace(primitive, outcome) == runs["twin"].trace(primitive, outcome)


def test_the_documentation_names_every_primitive() -> None:
    """The table in `docs/reference/celery-compatibility.md` is the list of what is tested."""
    text = (ROOT / "docs" / "reference" / "celery-compatibility.md").read_text()
    table = text[text.index("| Primitive |") :].partition("\n\n")[0].splitlines()[2:]
    assert [line.split("|")[1].strip() for line in table] == [primitive.name for primitive in PRIMITIVES]
