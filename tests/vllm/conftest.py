"""Fixtures: a real `headstart serve`, and a real vLLM that decodes. See run.sh."""

import contextlib
import os
import pathlib
import sys
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "e2e"))
from server_process import Server

CACHE = pathlib.Path(os.environ.get("HEADSTART_CACHE", pathlib.Path.home() / ".cache/headstart"))
MODEL = CACHE / "models/SmolLM2-135M-Instruct"
TEXT = pathlib.Path("/usr/share/common-licenses/GPL-3")


def wait_for(condition, what, timeout_s=120.0):
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """serve(*flags) is a context manager that yields a Server of the model in float32."""

    @contextlib.contextmanager
    def run(*flags, model=MODEL):
        server = Server(model, tmp_path_factory.mktemp("server"), ("--dtype", "f32", *flags), "cpu")
        try:
            yield server.wait_until_ready()
        finally:
            server.kill()

    return run


@pytest.fixture(scope="session")
def server(serve):
    """What it ends with is checked: every lease was given back."""
    with serve() as running:
        yield running
        with running.client() as client:
            wait_for(lambda: client.loads().leases == 0, "leases are given back", 30)
        running.stop()


@pytest.fixture(scope="session")
def text():
    """Token ids of a long text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tokenizer.encode(TEXT.read_text(), add_special_tokens=False).ids
    assert len(ids) > 7000
    return ids * 2


@pytest.fixture(scope="session")
def engine(server, tmp_path_factory):
    """Asks `server`, or the one that a request names."""
    from offline import OfflineEngine

    made = OfflineEngine(MODEL, tmp_path_factory.mktemp("vllm"), server.target, allow_any_target=True, timeout_s=300)
    yield made
    made.scheduler.shutdown()
