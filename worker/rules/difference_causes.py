"""What could make a difference between a group of an aggregated invoice and the ledger. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from worker.rules.decimals import amount_text
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
    """Calls at the price of another mode."""
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


ModesByPrice = Mapping[Decimal, Sequence[str]]
"""The modes of the provider's environments that have a price."""


def difference_causes(scope: Scope, currency: str, unit: Decimal, modes: ModesByPrice) -> list[Cause]:
    """Return what could make the difference between the lines and the posted calls of their time, the likeliest first.

    Args:
        scope: the lines and the calls that they may charge.
        currency: the currency of the amounts.
        unit: its smallest unit.
        modes: the modes of each price of the price list.
    """
    return _count_causes(scope, currency, modes) + _price_causes(scope, currency, unit)


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


def _count_causes(scope: Scope, currency: str, modes: ModesByPrice) -> list[Cause]:
    least, others = len(scope.surely_charged), len(scope.perhaps_charged)
    if scope.count > least + others:
        return _surplus_causes(scope, scope.count - least - others)
    if scope.count < least:
        return [_deficit_cause(scope, least - scope.count, currency, modes)]
    causes = []
    pending = sum(call.state == EntryState.PENDING for call in scope.certain)
    if pending:
        causes.append(
            Cause(
                kind=CauseKind.PENDING,
                calls=pending,
                text=f"the results of {pending} calls are unknown: the invoice charges some, all or none of them",
            )
        )
    near = sum(call.state != EntryState.VOID for call in scope.uncertain)
    if near:
        causes.append(
            Cause(
                kind=CauseKind.BOUNDARY,
                calls=near,
                text=f"{near} calls are within the tolerance of a boundary: the neighbouring line or invoice may "
                "charge them",
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
                text=f"{void} calls are void in the ledger: the invoice may charge {min(void, surplus)} of them",
            )
        )
    if surplus > void:
        causes.append(
            Cause(
                kind=CauseKind.NOT_IN_LEDGER,
                calls=surplus - void,
                text=f"{surplus - void} calls are not in the ledger: another system uses the key, or they are of "
                "another mode or kind",
            )
        )
    return causes


def _deficit_cause(scope: Scope, deficit: int, currency: str, modes: ModesByPrice) -> Cause:
    charged_prices = {unit_price_of(line) for line in scope.lines}
    at_price = Counter(call.price for call in scope.surely_charged)
    for price, calls in at_price.items():
        if calls == deficit and price in modes and price not in charged_prices:
            price_text, names = amount_text(price, currency), " and ".join(modes[price])
            text = f"{calls} calls have the price {price_text} of the mode {names}: the invoice omits this mode"
            return Cause(kind=CauseKind.MODE, calls=calls, text=text)
    return Cause(
        kind=CauseKind.NOT_ON_INVOICE,
        calls=deficit,
        text=f"the invoice omits {deficit} posted calls: they are of another mode or key, or on another invoice",
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
