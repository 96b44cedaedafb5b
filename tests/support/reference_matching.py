"""A matching of an invoice's lines and calls by one breadth-first search per call: slow, and simple enough to trust."""

from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta

from worker.rules.call_matching import LedgerCall, LineMatch
from worker.rules.invoice_lines import InvoiceLine


def match_lines_one_by_one(
    lines: Sequence[InvoiceLine], calls: Sequence[LedgerCall], tolerance: timedelta
) -> list[LineMatch]:
    """Return a maximum matching of one account's lines and calls, in the order of the lines.

    Calls are given by priority: a call has a line whenever all calls before it that have one can keep one.
    """
    matching = _Matching(lines, tolerance)
    for call in calls:
        matching.try_match(call)
    return [
        LineMatch(line=line, call=matching.call_by_row[line.row]) for line in lines if line.row in matching.call_by_row
    ]


class _Matching:
    """A bipartite matching of lines and calls that grows by augmenting paths."""

    def __init__(self, lines: Sequence[InvoiceLine], tolerance: timedelta) -> None:
        self._lines = lines
        self._tolerance = tolerance
        self.call_by_row: dict[int, LedgerCall] = {}
        self._row_by_call: dict[str, int] = {}

    def try_match(self, call: LedgerCall) -> None:
        """Match the call if there is an augmenting path from it. Search breadth-first."""
        parent: dict[int, LedgerCall] = {}
        queue = deque([call])
        while queue:
            current = queue.popleft()
            for line in self._candidate_lines_best_first(current):
                if line.row in parent:
                    continue
                parent[line.row] = current
                if line.row not in self.call_by_row:
                    self._augment(line.row, parent)
                    return
                queue.append(self.call_by_row[line.row])

    def _candidate_lines_best_first(self, call: LedgerCall) -> list[InvoiceLine]:
        """Return the lines that may charge this call, the most likely first."""
        near = [line for line in self._lines if line.since - self._tolerance <= call.at <= line.until + self._tolerance]
        return sorted(near, key=lambda line: (line.amount != call.price, abs(call.at - line.since), line.row))

    def _augment(self, free_row: int, parent: Mapping[int, LedgerCall]) -> None:
        """Move each call on the path one line further, from the free line back to the new call."""
        row: int | None = free_row
        while row is not None:
            call = parent[row]
            previous_row = self._row_by_call.get(call.call_id)
            self.call_by_row[row], self._row_by_call[call.call_id] = call, row
            row = previous_row
