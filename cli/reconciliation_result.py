"""Result of a reconciliation, for programs."""

from typing import Any

from cli import render
from worker.flow import Invoice
from worker.reports.invoice_reconciliation import ReconciliationResult
from worker.rules.aggregated_reconciliation import AggregatedReconciliation
from worker.rules.reconciliation import Reconciliation


def result_as_json(result: ReconciliationResult) -> str:
    """Return the whole result for programs."""
    found = result.found
    values = _json_by_call(found) if isinstance(found, Reconciliation) else _json_aggregated(found)
    return render.as_json({**_json_head(result.invoice), **values, "applied": result.application})


def _json_head(invoice: Invoice) -> dict[str, Any]:
    content = invoice.content
    return {
        "file": invoice.name,
        "digest": invoice.digest,
        "month": f"{invoice.period.since:%Y-%m}",
        "currency": invoice.currency,
        "level": content.level,
        "read_as": content.format.model_dump(mode="json", exclude_none=True),
        "assumptions": content.assumptions,
        "first_lines": content.first_lines,
        "credits": content.credits,
        "totals": content.totals,
    }


def _json_by_call(found: Reconciliation) -> dict[str, Any]:
    return {
        "has_differences": found.has_differences,
        "matched": len(found.matched),
        "price_differences": found.price_differences,
        "rounded_amounts": found.rounded_amounts,
        "charged_though_void": found.charged_though_void,
        "unmatched_lines": found.unmatched_lines,
        "unmatched_calls": found.unmatched_calls,
        "missing_calls": [call.call_id for call in found.missing_posted_calls_away_from_edges],
        "to_post": [match.call.call_id for match in found.to_post],
        "to_void": [call.call_id for call in found.to_void],
        "deferred_calls": [call.call_id for call in found.deferred_calls],
    }


def _json_aggregated(found: AggregatedReconciliation) -> dict[str, Any]:
    return {
        "has_differences": found.has_differences,
        "groups": found.groups,
        "calls_without_line": found.calls_without_line,
        "to_post": found.to_post,
        "to_void": found.to_void,
        "undecided_calls": [call.call_id for call in found.undecided_calls],
    }
