"""`payready webhooks status` and `payready doctor` try the exact address of the subscription."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from cli.doctor_provider_checks import check_public_webhook_address
from cli.doctor_results import CheckContext, Severity
from cli.main import app
from cli.webhook_probe import find_problem_by_test_delivery
from config.clock import utc_now
from config.settings import Settings, settings
from tests.support.databases import Databases
from tests.support.simulator import Simulator
from tests.support.tls_proxy import Certificate, make_certificate, tls_proxy
from tests.webhook.conftest import SECRET, Endpoint, endpoint
from worker.runtime import build_runtime

PATH = "/webhooks/quiltt"
OURS = Settings(webhook_secrets=(SecretStr(SECRET),))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("probed")
    with endpoint(folder, Databases(folder, None).new(), valkey_url) as running:
        yield running


@contextmanager
def always(status: int, **headers: str) -> Iterator[str]:
    """Serve an address that responds to every request alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/webhooks/quiltt"
        finally:
            server.shutdown()
            thread.join()


def problem_text(url: str, chosen: Settings = OURS) -> str:
    problem = find_problem_by_test_delivery(url, chosen, utc_now())
    return problem.message if problem else ""


def test_endpoint_with_this_secret_has_no_problem(web: Endpoint) -> None:
    """A host without a secret sends an unsigned delivery, and expects that it is rejected."""
    assert problem_text(web.url + PATH) == ""
    assert problem_text(web.url + PATH, Settings()) == ""


@pytest.mark.parametrize("path", [f"{PATH}/", "/Webhooks/quiltt", f"/api{PATH}", "/"])
def test_almost_correct_path_is_a_problem(web: Endpoint, path: str) -> None:
    for chosen in (OURS, Settings()):
        assert "responds 404" in problem_text(web.url + path, chosen)


def test_other_secret_is_a_problem(web: Endpoint) -> None:
    other = Settings(webhook_secrets=(SecretStr("another"),))
    assert problem_text(web.url + PATH, other) == f"{web.url}{PATH} responds 401 to a signed delivery"


@pytest.mark.parametrize("status", [200, 202, 301, 307, 403, 500])
def test_other_response_is_a_problem(web: Endpoint, status: int) -> None:
    """No redirect is followed, not even one to the endpoint. 200 is the response of another server."""
    with always(status, Location=web.url + PATH) as url:
        assert problem_text(url) == f"{url} responds {status} to a signed delivery"


def test_missing_response_is_a_problem_of_unknown_cause() -> None:
    """The network of this host may be the cause."""
    problem = find_problem_by_test_delivery(f"http://127.0.0.1:1{PATH}", OURS, utc_now())
    assert problem is not None
    assert problem.is_unreachable_from_here


def test_invalid_certificate_is_a_problem(
    web: Endpoint, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tls_proxy(certificate, web.url, str) as url:
        assert "no TLS connection" in problem_text(url + PATH)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
        assert problem_text(url + PATH) == ""


@pytest.fixture
def status(
    web: Endpoint, certificate: Certificate, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Any]:
    """Return a function that subscribes an address at a provider, and returns the result of `webhooks status`."""

    def run(url: str) -> Any:
        with Simulator("http://127.0.0.1:9/", secret="s", api_key="qk_tests") as simulator:
            for name, value in {
                "PAYREADY_QUILTT_API_URL": simulator.url,
                "PAYREADY_QUILTT_API_KEY": simulator.api_key,
                "PAYREADY_WEBHOOK_URL": url,
                "PAYREADY_WEBHOOK_SECRETS": SECRET,
                "PAYREADY_REDIS_URL": valkey_url,
                "SSL_CERT_FILE": str(certificate.file),
            }.items():
                monkeypatch.setenv(name, value)
            for module in ("cli.webhook_commands", "cli.command_line", "cli.command_runtime"):
                monkeypatch.setattr(f"{module}.settings", settings.__wrapped__)
            assert CliRunner().invoke(app, ["webhooks", "subscribe"]).exit_code == 0
            return CliRunner().invoke(app, ["webhooks", "status", "--json"])

    return run


def test_status_tries_the_subscribed_address(
    web: Endpoint, certificate: Certificate, status: Callable[[str], Any]
) -> None:
    """The subscription itself is in order each time."""
    with tls_proxy(certificate, web.url, str) as url:
        fine = status(url + PATH)
        assert (fine.exit_code, json.loads(fine.stdout)["problems"]) == (0, [])
        wrong = status(f"{url}{PATH}/")
        [problem] = json.loads(wrong.stdout)["problems"]
        assert wrong.exit_code == 1
        assert problem.startswith(f"{url}{PATH}/ responds 404 to a signed delivery: ")
    with tls_proxy(certificate, web.url, lambda path: path.removeprefix("/webhooks")) as url:
        [problem] = json.loads(status(url + PATH).stdout)["problems"]
        assert "responds 404" in problem
    gone = status(url + PATH)
    assert gone.exit_code == 1
    assert "no response at" in gone.stdout


def test_doctor_tries_the_subscribed_address(
    web: Endpoint, certificate: Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address that cannot be reached from this host is a warning: the provider may reach it."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))

    def severity(url: str | None) -> list[Severity]:
        chosen = Settings(
            database_url=f"sqlite:///{tmp_path}/x.db", webhook_secrets=(SecretStr(SECRET),), webhook_url=url
        )
        context = CheckContext(settings=chosen, rt=build_runtime(chosen), flower_url="", web_url="", dashboard_url="")
        return [result.severity for result in check_public_webhook_address(context)]

    with tls_proxy(certificate, web.url, str) as url:
        assert severity(url + PATH) == [Severity.OK]
        assert severity(f"{url}{PATH}/") == [Severity.ERROR]
    assert severity(url + PATH) == [Severity.WARNING]
    assert severity(None) == []
