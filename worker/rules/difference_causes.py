"""What could make a difference between a group of an aggregated invoice and the ledger. Pure."""

from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from worker.rules.decimals import amount_text, count_text
from worker.rules.line_groups import Scope, agrees, unit_price_of
from worker.rules.pricing import EntryState


class CauseKind(StrEnum):
    """A kind of cause."""

    PENDING = "pending"
    """Calls with an unknown result."""
    BOUNDARY = "boundary"
    """Calls so near to a boundary that the neighbouring line or invoice may charge them."""
    VOID = "void"
    """Calls that the ledger has as free."""
    MODE = "mode"
    """Calls of a mode of the API key that the invoice omits."""
    PRICE = "price"
    """Another price per call."""
    ROUNDING = "rounding"
    """Amounts that are rounded to the currency's smallest unit."""
    CALCULATION = "calculation"
    """A line whose amount is not its count multiplied by its price."""
    NOT_IN_LEDGER = "not_in_ledger"
    """More calls than the ledger has."""
    NOT_ON_INVOICE = "not_on_invoice"
    """Fewer calls than the ledger has."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A possible cause of a difference."""

    kind: CauseKind
    calls: int
    """Number of calls that it may concern."""
    text: str
    """One sentence for people."""


def difference_causes(scope: Scope, currency: str, unit: Decimal) -> list[Cause]:
    """Return what could make the difference between the lines and the posted calls of their time, the likeliest first.

    Args:
        scope: the lines and the calls that they may charge.
        currency: the currency of the amounts.
        unit: its smallest unit.
    """
    return _count_causes(scope) + _price_causes(scope, currency, unit)


def calculation_causes(scope: Scope, currency: str, unit: Decimal) -> list[Cause]:
    """Return the lines whose amounts are not their counts multiplied by their prices."""
    return [
        Cause(
            kind=CauseKind.CALCULATION,
            calls=line.count,
            text=f"line {line.row}: {line.count} x {amount_text(line.unit_price, currency)} is not "
            f"{amount_text(line.amount, currency)}",
        )
        for line in scope.lines
        if line.unit_price is not None and not agrees(line.count * line.unit_price, line.amount, unit, 1)
    ]


def _count_causes(scope: Scope) -> list[Cause]:
    least, others = len(scope.surely_charged), len(scope.perhaps_charged)
    if scope.count > least + others:
        return _surplus_causes(scope, scope.count - least - others)
    if scope.count < least:
        return [_deficit_cause(scope, least - scope.count)]
    causes = []
    pending = sum(call.state == EntryState.PENDING for call in scope.certain)
    if pending:
        causes.append(
            Cause(
                kind=CauseKind.PENDING,
                calls=pending,
                text=f"{count_text(pending, 'call')} with an unknown result, which the invoice may charge or not",
            )
        )
    near = sum(call.state != EntryState.VOID for call in scope.uncertain)
    if near:
        causes.append(
            Cause(
                kind=CauseKind.BOUNDARY,
                calls=near,
                text=f"{count_text(near, 'call')} within the tolerance of a boundary, which the neighbouring line or "
                "invoice may charge",
            )
        )
    return causes


def _surplus_causes(scope: Scope, surplus: int) -> list[Cause]:
    void = sum(call.state == EntryState.VOID for call in (*scope.certain, *scope.uncertain))
    causes = []
    if void:
        causes.append(
            Cause(
                kind=CauseKind.VOID,
                calls=min(void, surplus),
                text=f"{count_text(void, 'call')} void in the ledger, of which the invoice may charge "
                f"{min(void, surplus)}",
            )
        )
    if surplus > void:
        causes.append(
            Cause(
                kind=CauseKind.NOT_IN_LEDGER,
                calls=surplus - void,
                text=f"{count_text(surplus - void, 'call')} not in the ledger: of another system that uses the key, or "
                "of another mode or kind",
            )
        )
    return causes


def _deficit_cause(scope: Scope, deficit: int) -> Cause:
    of_mode = Counter(call.mode for call in scope.surely_charged)
    omitted = [mode for mode, calls in of_mode.items() if mode is not None and calls == deficit]
    if omitted and len(of_mode) > 1:
        text = f"{count_text(deficit, 'call')} of the mode {' or '.join(omitted)}, which the invoice omits"
        return Cause(kind=CauseKind.MODE, calls=deficit, text=text)
    return Cause(
        kind=CauseKind.NOT_ON_INVOICE,
        calls=deficit,
        text=f"the invoice omits {count_text(deficit, 'posted call')}, of another key, or on another invoice",
    )


def _price_causes(scope: Scope, currency: str, unit: Decimal) -> list[Cause]:
    if not scope.count_is_possible:
        return []
    if scope.amount_is_possible(unit):
        exact = scope.amount_is_possible(Decimal(0))
        text = f"the amounts are rounded to {amount_text(unit, currency)}"
        return [] if exact else [Cause(kind=CauseKind.ROUNDING, calls=scope.count, text=text)]
    prices = {call.price for call in (*scope.surely_charged, *scope.perhaps_charged)}
    in_ledger = " and ".join(amount_text(price, currency) for price in sorted(prices))
    charged = {price for line in scope.lines if (price := unit_price_of(line)) is not None}
    on_invoice = " and ".join(amount_text(price, currency) for price in sorted(charged))
    text = f"the price of a call is {on_invoice} on the invoice, and {in_ledger} in the ledger"
    return [Cause(kind=CauseKind.PRICE, calls=scope.count, text=text)]
