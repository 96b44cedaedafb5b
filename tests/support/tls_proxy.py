"""A TLS-terminating proxy on this machine, as in front of `web`, that may lead to another path."""

import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from ssl import PROTOCOL_TLS_SERVER, SSLContext
from threading import Thread


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A self-signed certificate for localhost. Clients accept it if `SSL_CERT_FILE` names its file."""

    file: Path
    key: Path


def make_certificate(folder: Path) -> Certificate:
    """Create a certificate with its key."""
    certificate = Certificate(file=folder / "cert.pem", key=folder / "key.pem")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    files = ["-keyout", str(certificate.key), "-out", str(certificate.file)]
    subprocess.run([*command, *files], check=True, capture_output=True, timeout=60)
    return certificate


def server_context(certificate: Certificate) -> SSLContext:
    """Return the TLS context of a server with this certificate."""
    context = SSLContext(PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.file, certificate.key)
    return context


@contextmanager
def tls_proxy(certificate: Certificate, backend_url: str, path: Callable[[str], str]) -> Iterator[str]:
    """Forward POST requests to the backend, with the path that `path` returns. Return the proxy's URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            forwarded = urllib.request.Request(backend_url + path(self.path), body, dict(self.headers))
            try:
                response = urllib.request.urlopen(forwarded, timeout=5)
            except urllib.error.HTTPError as rejected:
                response = rejected
            with response:
                self.send_response(response.status)
                self.end_headers()
                self.wfile.write(response.read())

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = server_context(certificate).wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"https://localhost:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
