"""The real `headstart serve` as a process of a test."""

import json
import os
import pathlib
import signal
import subprocess
import time
import urllib.error
import urllib.request

from headstart import PrefillClient


def program(name):
    """A program of the build under test."""
    return pathlib.Path(os.environ["HEADSTART_BIN_DIR"]) / name


class Server:
    """A running `headstart serve` on free ports of the loopback interface."""

    def __init__(self, model_dir, scratch, flags, device):
        self.log = scratch / "server.log"
        self._port_file = scratch / "ports.json"
        command = [
            program("headstart"), "serve", "--model", model_dir, "--device", device, "--threads", "2",
            "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--port-file", self._port_file, *flags,
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait_until_ready(self, timeout_s=120.0):
        end = time.monotonic() + timeout_s
        while not self._is_ready():
            assert self.process.poll() is None, f"the server ended: {self.log.read_text()}"
            assert time.monotonic() < end, f"the server is not ready: {self.log.read_text()}"
            time.sleep(0.02)
        return self

    def _is_ready(self):
        if not self._port_file.exists():
            return False
        self.ports = json.loads(self._port_file.read_text())
        try:
            return urllib.request.urlopen(self.admin_url + "/readyz", timeout=5).status == 200
        except urllib.error.HTTPError:
            return False

    @property
    def target(self):
        return f"127.0.0.1:{self.ports['port']}"

    @property
    def admin_url(self):
        return f"http://127.0.0.1:{self.ports['admin_port']}"

    def client(self, **options):
        return PrefillClient(self.target, **options)

    def stop(self):
        """Drains; the exit code must be 0."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.log.read_text()

    def kill(self):
        self.process.kill()
        self.process.wait()
