"""Two clusters roll apart: clients of a released format meet the present server, and servers of one meet what clients will send."""

import subprocess
import sys

import grpc
import pytest
from google.protobuf import descriptor_pb2
from headstart.wire import chunk_crc32c

from live import Server
from load import SERVICE, prompt
from manifests import REPO
from tiny_model import write_tiny_model
from wire import FILE, KEPT, breaks, descriptor_set, file_of, messages

# A field that nobody has, as a later format may: number 1000, a number; 1001, bytes.
UNKNOWN = b"\xc0\x3e\x2a" + b"\xca\x3e\x03new"


@pytest.fixture(scope="module")
def now(tmp_path_factory):
    """The format of this source tree."""
    path = tmp_path_factory.mktemp("wire") / "now.binpb"
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{REPO}/proto", "--include_imports", "-o", path, FILE], check=True)
    return descriptor_set(path)


def test_there_is_a_kept_format():
    assert [path.stem for path in KEPT][:1] == ["0.1.0"]


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.stem)
def test_fields_are_only_added(kept, now):
    assert not breaks(file_of(descriptor_set(kept)), file_of(now))


def changed(now, change):
    file = descriptor_pb2.FileDescriptorProto()
    file.CopyFrom(file_of(now))
    change({message.name: message for message in file.message_type}, file)
    return breaks(file_of(now), file)


def test_what_would_be_misunderstood_is_found(now):
    """The check above can fail."""
    def renumber(message, _):
        message["PrefillRequest"].field[0].number = 500

    def retype(message, _):
        message["PrefillRequest"].field[0].type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES

    def remove(message, _):
        del message["KvChunk"].field[-1]

    def renumber_value(_, file):
        file.enum_type[0].value[1].number = 77

    def remove_method(_, file):
        del file.service[0].method[-1]

    def add(message, _):
        message["PrefillRequest"].field.add(name="later", number=500, type=descriptor_pb2.FieldDescriptorProto.TYPE_BOOL)

    for change in (renumber, retype, remove, renumber_value, remove_method):
        assert changed(now, change), change.__name__
    assert not changed(now, add)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upgrade")
    with Server(write_tiny_model(folder / "tiny", layers=2), folder) as running:
        yield running


class OldClient:
    """Knows a kept format only; checks what a decode node checks."""

    def __init__(self, target, kept):
        self.types = messages(descriptor_set(kept))
        self.channel = grpc.insecure_channel(target)

    def call(self, method, request, response, stream=False):
        kind = self.channel.unary_stream if stream else self.channel.unary_unary
        return kind(f"{SERVICE}/{method}", lambda message: message, self.types[response].FromString)(request, timeout=60)

    def prefill(self, extra=b""):
        """The completion of a prompt whose chunks were all right."""
        request = self.types["PrefillRequest"](token_ids=prompt(300), request_id="old")
        chunks = 0
        for response in self.call("Prefill", request.SerializeToString() + extra, "PrefillResponse", stream=True):
            kind = response.WhichOneof("event")
            if kind == "chunk":
                assert response.chunk.crc32c == chunk_crc32c(response.chunk, response.chunk.data)
                chunks += 1
            last = response
        completed = self.types["Completed"].FromString(last.completed.completed)
        assert completed.num_chunks == chunks > 0
        return completed


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.stem)
def test_a_client_of_a_released_format_is_served(server, kept):
    client = OldClient(server.target, kept)
    info = client.call("GetServerInfo", b"", "GetServerInfoResponse")
    assert info.version.startswith("0.")
    assert client.call("GetModelInfo", b"", "GetModelInfoResponse").model_hash == client.prefill().manifest.model_hash


@pytest.mark.parametrize("kept", KEPT[-1:], ids=lambda path: path.stem)
def test_a_request_with_fields_of_a_later_format_is_served(server, kept):
    client = OldClient(server.target, kept)
    assert client.prefill(extra=UNKNOWN).first_token.id == client.prefill().first_token.id
