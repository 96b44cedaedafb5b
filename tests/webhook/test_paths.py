"""A request to a path that is almost the webhook's gets 404 and a log line, so that a wrong subscription is found."""

import json
from typing import Any

import pytest

from tests.webhook.conftest import Endpoint, delivery
from webhook.paths import difference_from_path

NEARLY = {
    "/webhooks/quiltt/": "trailing_slash",
    "/Webhooks/Quiltt": "case",
    "//webhooks//quiltt": "repeated_slash",
    "/webhooks/quiltt//": "repeated_slash",
    "/api/webhooks/quiltt": "prefix",
    "/api/Webhooks/quiltt/": "prefix",
    "/webhooks/quiltt/v1": "suffix",
}


def wrong_path_lines(web: Endpoint) -> list[dict[str, Any]]:
    lines = [line for line in web.log.read_text().splitlines() if "wrong_path" in line]
    return [json.loads(line) if line.startswith("{") else {"line": line} for line in lines]


@pytest.mark.parametrize("path", [*NEARLY, "/webhooks/quiltt%2F", "/quiltt"])
def test_delivery_to_almost_correct_path_gets_404(web: Endpoint, balance_id: str, path: str) -> None:
    """It is not committed, and not redirected."""
    body = delivery(balance_id)
    response = web.http.post(f"{web.url}{path}?token=whsec_in_a_query", content=body, headers=web.headers(body))
    assert response.status_code == 404
    assert balance_id not in web.balances()
    assert "wrong_path" in web.log.read_text()
    assert "whsec_in_a_query" not in web.log.read_text()


def test_flood_of_almost_correct_paths_logs_one_line_per_second(web: Endpoint) -> None:
    before = len(wrong_path_lines(web))
    for _ in range(200):
        assert web.http.get(f"{web.url}/webhooks/quiltt/").status_code == 404
    assert len(wrong_path_lines(web)) - before < 10


@pytest.mark.parametrize("path", NEARLY)
def test_difference_is_named(path: str) -> None:
    assert difference_from_path(path, []) == NEARLY[path]


def test_signed_request_to_any_path_is_a_near_miss() -> None:
    """A proxy that cuts a prefix off sends deliveries to such a path."""
    assert difference_from_path("/quiltt", [(b"quiltt-signature", b"x")]) == "other_path"


@pytest.mark.parametrize("path", ["/", "/healthz", "/webhooks", "/wp-login.php", "/webhooks/stripe"])
def test_other_path_is_no_near_miss(path: str) -> None:
    """Scanners request thousands of them."""
    assert difference_from_path(path, [(b"host", b"x")]) is None
