"""Fixtures: the real `headstart serve`, and models."""

import contextlib
import os
import pathlib

import pytest

from server_process import Server

CACHE = pathlib.Path(os.environ.get("HEADSTART_CACHE", pathlib.Path.home() / ".cache/headstart"))


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """serve(model_dir, *flags, device=...) is a context manager that yields a Server which is ready."""

    @contextlib.contextmanager
    def run(model_dir, *flags, device="cpu"):
        server = Server(model_dir, tmp_path_factory.mktemp("server"), flags, device)
        try:
            yield server.wait_until_ready()
            server.stop()
        finally:
            server.kill()

    return run


@pytest.fixture(scope="session")
def smollm2():
    """The directory that deploy/models/fetch_smollm2.sh makes."""
    path = CACHE / "models/SmolLM2-135M-Instruct"
    assert path.is_dir(), f"{path} is missing: run deploy/models/fetch_smollm2.sh"
    return path
