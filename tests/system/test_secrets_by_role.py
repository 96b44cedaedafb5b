"""Every role in production with no secret but its own, and Quiltt behind a proxy with a private authority."""

import shutil
from pathlib import Path

import pytest

from demo.processes import ROOT, assign_free_port, procfile, responds
from tests.support.connect_proxy import connect_proxy
from tests.support.servers import Postgres
from tests.support.system import API_KEY, SECRET, eventually, system
from tests.support.tls_proxy import make_certificate, tls_proxy

pytestmark = pytest.mark.slow

NO_SECRETS = {"PAYREADY_QUILTT_API_KEY": "", "PAYREADY_WEBHOOK_SECRETS": ""}


def test_payment_is_released_by_roles_with_their_own_secrets(tmp_path: Path, postgres_server: Postgres) -> None:
    """`web` has no API key, the workers no webhook secret, `beat`, `release` and Flower neither."""
    price_list = shutil.copy(ROOT / "config" / "price_list.toml", tmp_path)
    production = {"PAYREADY_ENV": "production", "PAYREADY_PRICE_LIST_FILE": str(price_list), **NO_SECRETS}
    certificate = make_certificate(tmp_path)
    with (
        system(tmp_path / "run", postgres_server.database(), "beat", **production) as payready,
        tls_proxy(certificate, payready.simulator.url, str) as quiltt,
        connect_proxy() as proxy,
    ):
        payready.start("web", PAYREADY_WEBHOOK_SECRETS=SECRET)
        way_to_quiltt = {
            "PAYREADY_QUILTT_API_URL": quiltt,
            "PAYREADY_QUILTT_AUTH_URL": quiltt,
            "PAYREADY_QUILTT_PROXY_URL": proxy.url("user:hunter2@"),
            "PAYREADY_QUILTT_CA_FILE": str(certificate.file),
        }
        payready.start("worker", "refresh", PAYREADY_QUILTT_API_KEY=API_KEY, **way_to_quiltt)
        port = assign_free_port()
        flower = {"FLOWER_PORT": str(port), "FLOWER_BASIC_AUTH": "a:b", "PAYREADY_DATABASE_URL": ""}
        payready.processes.start("flower", procfile()["flower"], **flower)
        payready.processes.wait_for("flower", lambda: responds(f"http://127.0.0.1:{port}/healthcheck"))

        released = payready.initiate("pay_1", "acct_prompt01", amount="27.31").get(timeout=20)
        assert released["verdict"] == "sufficient"
        assert eventually(lambda: payready.fees("acct_prompt01")[1:])[0][1] == "posted"
        assert {request.split()[0] for request in proxy.requests} == {"CONNECT"}
        assert API_KEY not in "".join(proxy.requests)
        logs = "".join(payready.processes.log_of(role).read_text() for role in ("worker", "refresh"))
        assert "hunter2" not in logs
