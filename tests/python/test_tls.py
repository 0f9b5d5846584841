"""The Python client over TLS with certificates on both sides."""

import pathlib
import subprocess

import grpc
import numpy as np
import pytest
from headstart import HeadstartError, PrefillClient, Tls

from fake_server import TOKENS, FakeKeeper, make_kv


def make_files(folder, names):
    """Key and certificate, which is its own authority, for server and client alike."""
    key, cert = str(folder / "tls.key"), str(folder / "tls.crt")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", cert, "-subj", "/CN=localhost",
         "-addext", f"subjectAltName={names}"],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, cert


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("tls"), "DNS:localhost,DNS:prefill.example,IP:127.0.0.1")


def server_credentials(files):
    key, cert = (pathlib.Path(name).read_bytes() for name in files)
    return grpc.ssl_server_credentials([(key, cert)], cert, True)


@pytest.fixture
def target(files):
    with FakeKeeper().running(credentials=server_credentials(files)) as address:
        yield address


@pytest.mark.parametrize("server_name", ["", "prefill.example"])
@pytest.mark.parametrize("connections", [2, 3])
def test_receives_where_both_sides_are_known(make_client, files, target, server_name, connections):
    key, cert = files
    client = make_client(target, tls=Tls(cert, cert, key, server_name), connections=connections)
    np.testing.assert_array_equal(client.prefill(TOKENS).kv, make_kv())


def test_a_server_that_names_its_address_shows_the_name_that_was_called(make_client, tmp_path):
    """As a pod behind a Service does, whose certificate can't know its address."""
    key, cert = make_files(tmp_path, "DNS:localhost")
    keeper = FakeKeeper()
    with keeper.running(credentials=server_credentials((key, cert))) as address:
        keeper.fetch_address = address
        called = address.replace("127.0.0.1", "localhost")
        client = make_client(called, tls=Tls(cert, cert, key), connections=2, allowed_fetch_hosts=["127.0.0.1"])
        np.testing.assert_array_equal(client.prefill(TOKENS).kv, make_kv())


@pytest.mark.parametrize("stranger", ["no certificate", "plain text", "other name"])
def test_strangers_are_unavailable(make_client, files, target, stranger):
    key, cert = files
    tls = {"no certificate": Tls(cert), "plain text": None, "other name": Tls(cert, cert, key, "example.com")}[stranger]
    with pytest.raises(HeadstartError) as caught:
        make_client(target, tls=tls, max_attempts=1, connections=2).prefill(TOKENS)
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE


def test_half_a_pair_and_missing_files_are_refused(files, tmp_path):
    key, cert = files
    with pytest.raises(ValueError, match="belong together"):
        PrefillClient("127.0.0.1:1", tls=Tls(cert, cert_file=cert))
    with pytest.raises(FileNotFoundError, match="nothing"):
        PrefillClient("127.0.0.1:1", tls=Tls(str(tmp_path / "nothing")))
