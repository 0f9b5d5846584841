"""Fixtures: every test of a client runs with the pure receiver, and with the native one where HEADSTART_RECEIVER_LIBRARY is
its library."""

import os

import pytest
from headstart import PrefillClient, native

from fake_server import TOKENS, FakeServer

HAS_NATIVE = "HEADSTART_RECEIVER_LIBRARY" in os.environ


@pytest.fixture(params=["pure", pytest.param("native", marks=pytest.mark.skipif(not HAS_NATIVE, reason="no library given"))])
def make_client(request):
    """make_client(target, **options): a PrefillClient of the kind that the test runs with."""
    if request.param == "native":
        assert native.available(), "the library that HEADSTART_RECEIVER_LIBRARY names can't be loaded"
    clients = []

    def make(target, **options):
        options = {"timeout_s": 20, "connections": 1, **options}
        clients.append(PrefillClient(target, use_native=request.param == "native", **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def prefill(make_client):
    """prefill(*scripts, **options): result and server of one call against a server that plays the scripts."""

    def run(*scripts, client_options=None, **options):
        server = FakeServer(*scripts)
        with server.running() as target:
            return make_client(target, **(client_options or {})).prefill(TOKENS, **options), server

    return run
