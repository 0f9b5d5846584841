"""The Python client over TLS with certificates on both sides."""

import contextlib
import pathlib
import shutil
import socket
import subprocess
import time

import grpc
import numpy as np
import pytest
from headstart import HeadstartError, PrefillClient, Tls
from headstart.channels import _CertificateFiles

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


class Client:
    """A client and its certificate files, which are replaced as Kubernetes does it: each at once."""

    def __init__(self, make_client, port, folder, authorities, pair):
        self.folder = folder
        self.write(authorities, pair)
        tls = Tls(*(str(folder / name) for name in ("ca.crt", "tls.crt", "tls.key")))
        self.client = make_client(f"127.0.0.1:{port}", tls=tls, connections=2, max_attempts=1)

    def write(self, authorities, pair):
        key, cert = pair
        texts = {"ca.crt": bundle(authorities), "tls.key": pathlib.Path(key).read_bytes(), "tls.crt": pathlib.Path(cert).read_bytes()}
        for name, text in texts.items():
            (self.folder / "next").write_bytes(text)
            (self.folder / "next").replace(self.folder / name)

    def works(self):
        try:
            np.testing.assert_array_equal(self.client.prefill(TOKENS).kv, make_kv())
        except HeadstartError:  # a call may also meet the end of the server before
            return False
        return True


def bundle(authorities):
    """The certificates of these pairs, which are authorities of their own."""
    return b"".join(pathlib.Path(cert).read_bytes() for _, cert in authorities)


@contextlib.contextmanager
def serving(port, authorities, pair):
    key, cert = (pathlib.Path(name).read_bytes() for name in pair)
    credentials = grpc.ssl_server_credentials([(key, cert)], bundle(authorities), True)
    with FakeKeeper().running(address=f"127.0.0.1:{port}", credentials=credentials):
        yield


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def comes_true(condition, patience=60):
    """The native receiver looks at files every few seconds."""
    limit = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < limit
    return True


@pytest.fixture
def authorities(tmp_path):
    """Two: old and new."""
    made = []
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        made.append(make_files(tmp_path / name, "DNS:localhost,IP:127.0.0.1"))
    return made


def test_a_renewed_certificate_and_a_new_authority_reach_a_client_that_lives_on(make_client, tmp_path, authorities):
    """The steps of a roll-over; the client is made once."""
    old, new = authorities
    port = free_port()
    client = Client(make_client, port, tmp_path, [old], old)
    with serving(port, [old], old):
        assert comes_true(client.works)
    # 1: all trust both
    client.write([old, new], old)
    with serving(port, [old, new], old):
        assert comes_true(client.works)
    # 2: the new one's certificates, first the server's
    with serving(port, [old, new], new):
        assert comes_true(client.works)
        client.write([old, new], new)
    with serving(port, [new], new):  # 3: nobody trusts the old one; the client shows the new certificate
        assert comes_true(client.works)
        client.write([new], new)
    with serving(port, [new], new):
        assert comes_true(client.works)


def test_a_client_that_knows_only_the_old_authority_refuses_the_new_ones_server(make_client, tmp_path, authorities):
    old, new = authorities
    port = free_port()
    client = Client(make_client, port, tmp_path, [old], old)
    with serving(port, [old, new], new):
        assert not client.works()


def test_half_a_rotation_leaves_the_last_whole_set(tmp_path, authorities):
    """Between two files of a set that somebody replaces by hand."""
    (old_key, old_cert), (new_key, new_cert) = authorities
    key, cert = tmp_path / "tls.key", tmp_path / "tls.crt"
    shutil.copy(old_key, key), shutil.copy(old_cert, cert)
    files = _CertificateFiles(Tls(str(cert), str(cert), str(key)))
    first = files.credentials
    assert not files.reload()
    shutil.copy(new_cert, cert)
    assert not files.reload() and files.credentials is first
    key.unlink()
    assert not files.reload() and files.credentials is first
    shutil.copy(new_key, key)
    assert files.reload() and files.credentials is not first
    assert not files.reload()
