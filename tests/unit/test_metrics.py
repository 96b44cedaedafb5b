"""Metric definitions agree with the rules that produce their label values, and `/metrics` serves them."""

import re
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any, get_args

import pytest
from prometheus_client import REGISTRY

from webhook import signature
from worker import errors, metrics
from worker.correlation.admission import Denied
from worker.ledger.metrics_queries import NO_REFRESH
from worker.metrics_server import start_metrics_server
from worker.rules.fee_caps import CapKind
from worker.rules.pricing import EntryState
from worker.rules.states import ACTIVE_STATES, PaymentState, RefreshState
from worker.webhook_results import DELIVERY_RESULTS


def label_values(name: str, label: str) -> set[str]:
    """Return the declared values of a label."""
    (definition,) = (metric for metric in metrics.METRICS if metric.name == name)
    (found,) = (known for known in definition.labels if known.name == label)
    return set(found.values)


def subclasses(error: type[Any]) -> Iterable[type[Any]]:
    """Yield all subclasses, at any depth."""
    for child in error.__subclasses__():
        yield child
        yield from subclasses(child)


@pytest.mark.parametrize(
    ("name", "label", "values"),
    [
        ("payready_waiting_payments", "refresh", {NO_REFRESH, *ACTIVE_STATES, RefreshState.UNANSWERED}),
        ("payready_fee_caps_reached_total", "cap", set(CapKind)),
        ("payready_fee_cap_warnings_total", "cap", set(CapKind)),
        ("payready_fee_cap_used_ratio", "cap", {CapKind.DAY, CapKind.MONTH}),
        ("payready_fee_entries_total", "state", set(EntryState)),
        ("payready_outcomes_total", "state", {PaymentState.RELEASED, PaymentState.FAILED}),
        ("payready_delayed_calls_total", "reason", set(get_args(Denied.__dataclass_fields__["reason"].type))),
        (
            "payready_provider_calls_total",
            "result",
            {"accepted"} | {error.result for error in subclasses(errors.CallFailed)},
        ),
    ],
)
def test_declared_label_values_are_those_of_the_rules(name: str, label: str, values: set[str]) -> None:
    assert label_values(name, label) == values


def test_every_signature_refusal_is_a_delivery_result_with_status_401() -> None:
    refusals = {refusal.reason for refusal in subclasses(signature.SignatureRefused)}
    unauthorized = {name for name, result in DELIVERY_RESULTS.items() if result.status == 401}
    assert refusals == unauthorized


def test_declared_label_values_exist_from_the_start() -> None:
    samples = {(sample.name, *sample.labels.values()) for family in REGISTRY.collect() for sample in family.samples}
    declared = {
        (metric.name, value)
        for metric in metrics.METRICS
        if metric.source is None and metric.kind == "counter"
        for label in metric.labels
        for value in label.values
    }
    assert declared <= samples


def test_definitions_are_complete_and_names_unique() -> None:
    names = [metric.name for metric in metrics.METRICS]
    assert len(set(names)) == len(names)
    for metric in metrics.METRICS:
        assert re.fullmatch(r"payready_[a-z_]+", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert metric.help_text.endswith(".")
        assert all(label.values or label.meaning for label in metric.labels)


def test_metrics_server_serves_metrics_health_and_readiness() -> None:
    ready = [False]
    port = start_metrics_server("127.0.0.1", 0, is_ready=lambda: ready[0])

    def get(path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    assert [get(path) for path in ("/metrics", "/healthz", "/readyz", "/other")] == [200, 200, 503, 404]
    ready[0] = True
    assert get("/readyz") == 200
    assert port is not None
    assert start_metrics_server("127.0.0.1", port) is None


@pytest.mark.parametrize(
    ("host", "clients"), [("::1", ["[::1]"]), ("::", ["[::1]", "127.0.0.1"]), ("0.0.0.0", ["127.0.0.1"])]
)
def test_metrics_server_listens_on_ipv6_addresses(host: str, clients: list[str]) -> None:
    """`::` accepts both families, so that a check at 127.0.0.1 still works."""
    port = start_metrics_server(host, 0)
    assert port is not None
    for client in clients:
        with urllib.request.urlopen(f"http://{client}:{port}/healthz", timeout=5) as response:
            assert response.status == 200
