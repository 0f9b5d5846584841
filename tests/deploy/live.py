"""A real `headstart serve` and a real Prometheus, on loopback, for as long as a `with` lasts."""

import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import yaml

from manifests import REPO
from promql import RULES


def headstart():
    """Path of the program that was built."""
    path = pathlib.Path(os.environ.get("HEADSTART_BIN_DIR", REPO / "build/cpu/bin")) / "headstart"
    assert path.exists(), f"{path} is missing: build the target headstart, or set HEADSTART_BIN_DIR"
    return path


def get(url, timeout=5):
    """(HTTP status, body); status 0 when nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def wait_for(condition, what, timeout=30.0):
    """Polls until the condition gives something true, and returns that."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s"
        time.sleep(0.02)
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Process:
    """Ends with the block, whatever happens in it."""

    def __init__(self, arguments, log):
        self.log = log
        with open(log, "ab") as output:
            self.process = subprocess.Popen([*map(str, arguments)], stdout=output, stderr=output)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def running(self):
        assert self.process.poll() is None, f"{self.log} ended with {self.process.returncode}:\n{self.log_text()}"
        return True

    def log_text(self):
        return self.log.read_text()

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout=60):
        return self.process.wait(timeout)


class Server(Process):
    """Ready when the constructor returns. `target` is for gRPC, `admin` for HTTP, both host:port."""

    def __init__(self, model, folder, name="server", *flags, listen="127.0.0.1:0"):
        ports = folder / f"{name}.ports"
        ports.unlink(missing_ok=True)
        super().__init__([headstart(), "serve", f"--model={model}", f"--listen={listen}", "--admin-listen=127.0.0.1:0",
                          f"--port-file={ports}", *flags], folder / f"{name}.log")
        try:
            text = wait_for(lambda: self.running() and ports.exists() and ports.read_text().endswith("\n")
                            and ports.read_text(), "port file")
            found = json.loads(text)
            self.target, self.admin = f"127.0.0.1:{found['port']}", f"127.0.0.1:{found['admin_port']}"
            wait_for(lambda: self.running() and get(f"http://{self.admin}/readyz")[0] == 200, "readyz")
        except BaseException:
            self.__exit__()
            raise

    def metrics(self):
        status, text = get(f"http://{self.admin}/metrics")
        assert status == 200
        return text

    def value(self, name, **labels):
        """Sum of the series of a metric with these labels."""
        return sum(value for metric, have, value in parse_metrics(self.metrics())
                   if metric == name and labels.items() <= have.items())


def parse_metrics(text):
    """(name, labels, value) of every sample in the text format."""
    samples = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            series, value = line.rsplit(" ", 1)
            name, _, labels = series.partition("{")
            samples.append((name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
    return samples


class Prometheus(Process):
    """Scrapes one server a namespace every second under job="headstart", and evaluates the shipped rules as often."""

    def __init__(self, targets, folder):
        binary = shutil.which("prometheus")
        assert binary, "prometheus is missing: apt-get install prometheus"
        shipped = yaml.safe_load(RULES.read_text())
        for group in shipped["groups"]:
            group.pop("interval", None)
        (folder / "rules.yaml").write_text(yaml.safe_dump(shipped))
        (folder / "prometheus.yaml").write_text(yaml.safe_dump({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "headstart", "static_configs": [
                {"targets": [target], "labels": {"namespace": namespace}} for namespace, target in targets.items()]}],
        }))
        self.url = f"http://127.0.0.1:{free_port()}"
        super().__init__([binary, f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data",
                          f"--web.listen-address={self.url.removeprefix('http://')}"], folder / "prometheus.log")
        try:
            wait_for(lambda: self.running() and get(f"{self.url}/-/ready")[0] == 200, "Prometheus")
        except BaseException:
            self.__exit__()
            raise

    def api(self, path, **parameters):
        status, text = get(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30)
        assert status == 200, text
        return json.loads(text)["data"]

    def query(self, expr):
        """(labels, value) of every sample that the expression gives now, NaN left out."""
        data = self.api("query", query=expr)
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        found = [(sample["metric"], float(sample["value"][1])) for sample in data["result"]]
        return [(labels, value) for labels, value in found if not math.isnan(value)]
