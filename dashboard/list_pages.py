"""What the lists of dead letters and quarantined events share: pages by key, and the selection of rows."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request

from worker.ledger.retention import Position
from worker.rules.times import parse_utc_time

PAGE_SIZE = 50
_COUNT = re.compile("[0-9]{1,9}")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Rows that a user selected: by their ids, or all of a reason."""

    ids: list[str]
    """Empty for a reason whose rows are not read yet."""
    reason: str | None

    @property
    def subject(self) -> str:
        """Return the selection for the audit: an id, or how many."""
        if self.reason:
            return f"all with the reason {self.reason}"
        return self.ids[0] if len(self.ids) == 1 else f"{len(self.ids)} selected"

    @property
    def detail(self) -> dict[str, str] | None:
        """Return the ids for the audit, unless the subject is the only id."""
        return {"ids": ", ".join(self.ids)} if self.reason or len(self.ids) > 1 else None


def selection_of(form: FormData) -> Selection:
    """Return what the form selects.

    Raises:
        HTTPException: 400: it selects nothing, more than a page, or both ids and a reason.
    """
    ids = [each for each in form.getlist("id") if isinstance(each, str)]
    reason = form.get("reason")
    text = reason if isinstance(reason, str) and reason else None
    if bool(ids) == (text is not None) or len(ids) > PAGE_SIZE or any("\0" in each for each in ids):
        raise HTTPException(400, f"select up to {PAGE_SIZE} rows, or a reason")
    return Selection(ids=list(dict.fromkeys(ids)), reason=text)


def path_id(request: Request, name: str) -> str:
    """Return the id in the path of a request.

    Raises:
        HTTPException: 404: PostgreSQL can store no such id.
    """
    value: str = request.path_params[name]
    if "\0" in value:
        raise HTTPException(404, "there is no such id")
    return value


def position_text(at: datetime, key: str) -> str:
    """Return the position of a row in a list, for a link to the next page."""
    return f"{at.isoformat()} {key}"


def parse_position(text: str | None) -> Position | None:
    """Return the position of a link.

    Raises:
        HTTPException: 400: it is no such position.
    """
    if text is None:
        return None
    time, _, key = text.partition(" ")
    try:
        at = parse_utc_time(time)
    except ValueError:
        at = None
    if at is None or "\0" in key:
        raise HTTPException(400, "before must be the position of a row, as the link to the next page has it")
    return Position(at=at, key=key)


def counts_of(request: Request, names: Iterable[str]) -> dict[str, int]:
    """Return the numbers of these names that an action's redirect has. Other values are ignored."""
    texts = {name: request.query_params.get(name, "") for name in names}
    return {name: int(text) for name, text in texts.items() if _COUNT.fullmatch(text)}
