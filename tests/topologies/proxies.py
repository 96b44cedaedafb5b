"""HAProxy and nginx from the system's packages, with the configurations of the documentation."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from http.client import UNAUTHORIZED
from pathlib import Path

import httpx

from demo.processes import ROOT, assign_free_port
from tests.support.system import wait_until

PAGE = ROOT / "docs" / "howto" / "configure-the-proxy.md"
NGINX_FRAME = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
{user}
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{documented}
}}
"""
"""What Debian's nginx.conf has around a site. The folders are of the test."""
HAPROXY_FRAME = """
global
    maxconn 1000
{documented}
"""


def program(name: str) -> str | None:
    """Return the path of a program, also if only the path of root has it."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _documented(language: str, port: int, web_ports: Sequence[int]) -> str:
    """Return the page's configuration, with addresses of this machine and without TLS."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for number, web_port in enumerate(web_ports, 1):
        block, count = re.subn(rf"10\.0\.0\.{number}:8000", f"127.0.0.1:{web_port}", block)
        assert count == 1, f"the {language} configuration has other servers than this test"
    block = re.sub(r"^ *ssl_.*\n", "", block, flags=re.MULTILINE)
    block, count = re.subn(r"listen 443 ssl;|bind :443 ssl crt \S+", lambda found: _listen(found[0], port), block)
    assert count == 1, f"the {language} configuration listens on other ports than this test expects"
    return block


def _listen(documented: str, port: int) -> str:
    return f"bind 127.0.0.1:{port}" if documented.startswith("bind") else f"listen 127.0.0.1:{port};"


@contextmanager
def nginx(folder: Path, web_ports: Sequence[int]) -> Iterator[str]:
    """Run nginx in front of these ports for the duration of the block. Return its URL."""
    user = "user root;" if folder.owner() == "root" else ""  # else its workers cannot use the folders
    port = assign_free_port()
    documented = _documented("nginx", port, web_ports)
    config = folder / "nginx.conf"
    config.write_text(NGINX_FRAME.format(folder=folder, user=user, documented=documented))
    with _running(folder, [str(program("nginx")), "-c", str(config)], f"http://127.0.0.1:{port}") as url:
        yield url


@contextmanager
def haproxy(folder: Path, web_ports: Sequence[int]) -> Iterator[str]:
    """Run HAProxy in front of these ports for the duration of the block. Return its URL."""
    port = assign_free_port()
    config = folder / "haproxy.cfg"
    config.write_text(HAPROXY_FRAME.format(documented=_documented("haproxy", port, web_ports)))
    with _running(folder, [str(program("haproxy")), "-f", str(config)], f"http://127.0.0.1:{port}") as url:
        yield url


@contextmanager
def _running(folder: Path, command: Sequence[str], url: str) -> Iterator[str]:
    with (folder / "output.log").open("ab") as log:
        process = subprocess.Popen([*command], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: process.poll() is not None or _passes_a_request(url), 15, f"a proxy listens at {url}")
        assert process.poll() is None, (folder / "output.log").read_text()
        yield url
    finally:
        process.terminate()
        process.wait(10)


def _passes_a_request(url: str) -> bool:
    """Return whether `web` rejects an unsigned delivery through the proxy."""
    try:
        return httpx.post(f"{url}/webhooks/quiltt").status_code == UNAUTHORIZED
    except httpx.TransportError:
        return False


Proxy = Callable[[Path, Sequence[int]], AbstractContextManager[str]]
PROXIES: Mapping[str, Proxy] = {"haproxy": haproxy, "nginx": nginx}
