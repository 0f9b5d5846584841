"""A rolling restart of three servers under load, seen by clients that balance themselves."""

import collections
import json
import threading
import time

import pytest
from headstart import HeadstartError, PrefillClient

from live import Server
from load import prompt
from tiny_model import write_tiny_model

NUM_SERVERS = 3
NUM_CLIENTS = 4
LONG = 2048
FEW = 12  # requests that are answered between two restarts, at least
FLAGS = ("--threads=1", "--log-format=json")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", layers=8)


class Clients:
    """Threads that send prompts, long and short, until stop(); every failure is kept."""

    def __init__(self, targets):
        self.failures, self.attempts, self.done = [], collections.Counter(), 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        # One channel: gRPC's round_robin with health checking spreads the calls over the servers.
        self._client = PrefillClient("ipv4:" + ",".join(targets), timeout_s=60, max_attempts=5)
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True)
                         for number in range(NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self, number):
        turn = 0
        while not self._stop.is_set():
            turn += 1
            try:
                result = self._client.prefill(prompt(LONG if turn % 4 == 0 else 300, seed=number))
                with self._lock:
                    self.done += 1
                    self.attempts[result.attempts] += 1
            except HeadstartError as error:
                self.failures.append(error)

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        self._client.close()


def wait_until_done(clients, more):
    """Until this many requests more have been answered: the load reached what was started."""
    goal = clients.done + more
    deadline = time.monotonic() + 120  # a busy machine
    while clients.done < goal:
        assert time.monotonic() < deadline, f"{clients.done} of {goal}; failures: {clients.failures}"
        time.sleep(0.02)


def accepted_calls(folder):
    """Status codes of the calls that the servers accepted, as they logged them."""
    lines = [json.loads(line) for log in folder.glob("server-*.log")
             for line in log.read_text().splitlines() if line.startswith("{")]
    return collections.Counter(line["code"] for line in lines if line["event"] == "prefill"
                               and (line["code"] == "OK" or line["accepted"]))


def test_no_request_fails_during_a_rolling_restart(model, tmp_path):
    servers = [Server(model, tmp_path, f"server-{index}", *FLAGS) for index in range(NUM_SERVERS)]
    targets = [server.target for server in servers]
    clients = Clients(targets)
    try:
        wait_until_done(clients, FEW)
        for index, server in enumerate(servers):
            answered = server.value("headstart_requests_total", code="OK")
            assert answered > 0, "the load does not reach this server"
            start = time.monotonic()
            server.terminate()
            assert server.wait() == 0, server.log_text()
            drained = time.monotonic()
            servers[index] = Server(model, tmp_path, f"server-{index}", *FLAGS, listen=targets[index])
            print(f"server {index}: drained in {drained - start:.2f} s, back after {time.monotonic() - start:.2f} s")
            wait_until_done(clients, FEW)
            assert not clients.failures, clients.failures
        clients.stop()
    finally:
        for server in servers:
            server.__exit__()
    assert not clients.failures, clients.failures
    print(f"{clients.done} requests; attempts: {dict(clients.attempts)}")
    assert sum(clients.attempts.values()) == clients.done >= FEW * (NUM_SERVERS + 1)
    # A retry could hide an accepted request that broke; the servers' logs can't.
    assert accepted_calls(tmp_path) == {"OK": clients.done}
