"""Every page is shown on an empty ledger, and an unknown one is refused."""

import httpx
import pytest


@pytest.mark.parametrize("path", ["/"])
def test_page_is_shown_on_an_empty_ledger(operator: httpx.Client, path: str) -> None:
    response = operator.get(path)
    assert response.status_code == 200
    assert "<h1>" in response.text


def test_unknown_page_is_not_found(operator: httpx.Client) -> None:
    response = operator.get("/nowhere")
    assert response.status_code == 404
    assert "Not Found" in response.text
