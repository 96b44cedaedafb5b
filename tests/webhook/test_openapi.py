"""The OpenAPI document: generated requests get the responses that it describes."""

import json
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from requests import Request
from schemathesis import Case, GenerationMode

from tests.contracts import FOLDER, openapi
from tests.webhook.conftest import Endpoint

DOCUMENT = openapi()
_loaded: Any = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = {operation.ok().label: operation.ok() for operation in _loaded.get_all_operations()}
cases = st.one_of(
    [operation.as_strategy(generation_mode=mode) for operation in OPERATIONS.values() for mode in GenerationMode]
)


def test_published_openapi_document_is_current() -> None:
    """Otherwise run `make docs`."""
    assert json.loads((FOLDER / "openapi.json").read_text()) == DOCUMENT
    assert set(OPERATIONS) == {"POST /webhooks/quiltt", "GET /healthz", "GET /readyz"}


@settings(
    max_examples=150, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=True
)
@given(case=cases, signed=st.sampled_from([True, True, False]))
def test_every_response_is_documented(web: Endpoint, case: Case[Any], *, signed: bool) -> None:
    """Requests conform to the document or not, and are signed or not. The status is never 500."""
    response = _send(web, case, signed=signed)
    assert response.status_code < 500, response.text
    documented = DOCUMENT["paths"].get(case.path, {}).get(case.method.lower(), {}).get("responses", {})
    assert str(response.status_code) in {*documented, "400", "404", "405"}
    if case.path == "/webhooks/quiltt" and response.status_code != 405:
        assert response.content in (b"", b"Invalid HTTP request received.")


def _send(web: Endpoint, case: Case[Any], *, signed: bool) -> httpx.Response:
    """Send the bytes of a generated case."""
    arguments: dict[str, Any] = case.as_transport_kwargs(base_url=web.url)
    known = {name: arguments.get(name) for name in ("method", "url", "headers", "params", "data", "json")}
    prepared: Any = Request(**known).prepare()
    body = prepared.body.encode() if isinstance(prepared.body, str) else prepared.body or b""
    headers = {name: value for name, value in prepared.headers.items() if name != "Content-Length"}
    if signed:
        headers |= web.headers(body)
    return web.http.request(prepared.method, prepared.url, content=body, headers=headers)
