"""The client against servers of another age: released ones that know less, later ones that say more."""

import pathlib
import sys

import numpy as np
import pytest
from headstart.v1 import prefill_pb2 as pb

import fake_server
from fake_server import TOKENS, FakeKeeper, make_kv

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "deploy"))
from wire import KEPT, descriptor_set, messages  # noqa: E402

# Number 1000, and 1001 with bytes: fields that nobody has.
LATER = b"\xc0\x3e\x2a" + b"\xca\x3e\x03new"


class Aged(FakeKeeper):
    """Every message that it sends or gets goes through `age`: bytes and the message's name to bytes."""

    def __init__(self, age):
        super().__init__()
        self.age = age
        self.sent = 0

    def handlers(self):
        return {name: self._aged(handler) for name, handler in super().handlers().items()}

    def _aged(self, handler):
        def serialize(message):
            self.sent += 1
            return self.age(handler.response_serializer(message), message.DESCRIPTOR.name)

        def deserialize(data):
            request = handler.request_deserializer(data)
            return handler.request_deserializer(self.age(data, request.DESCRIPTOR.name))

        return handler._replace(response_serializer=serialize, request_deserializer=deserialize)


def released(path):
    """What a server of that format sends and understands: nothing else."""
    known = messages(descriptor_set(path))

    def age(data, name):
        message = known[name].FromString(data)
        message.DiscardUnknownFields()
        return message.SerializeToString()

    return age


def later(data, _):
    return data + LATER


@pytest.mark.parametrize("connections", [2, 3])
@pytest.mark.parametrize("age", [*map(released, KEPT), later], ids=[*(path.stem for path in KEPT), "later"])
def test_client_and_server_of_another_age(make_client, age, connections):
    keeper = Aged(age)
    with keeper.running() as target:
        result = make_client(target, connections=connections).prefill(TOKENS)
    np.testing.assert_array_equal(result.kv, make_kv())
    assert keeper.sent > 3


def test_a_later_servers_fields_are_unknown_here():
    """The test above can fail: this client does not know what is added."""
    assert pb.PrefillResponse.FromString(LATER).ListFields() == []
    assert fake_server.pb is pb
