"""A small load with everything that a server meets: prompts of all kinds, wrong ones, clients that leave or are slow."""

import collections
import contextlib
import threading
import time

import grpc
import numpy as np
from headstart import Attention, HeadstartError, Part, PrefillClient
from headstart.v1 import prefill_pb2 as pb

from tiny_model import VOCAB

# Flags of a server that this load brings to its limits.
LIMITS = ("--max-queue-requests=16", "--write-stall-timeout=1s", "--piece-tokens=512", "--host-kv-bytes=24MB",
          "--stuck-after=5s")
SERVICE = "/headstart.v1.PrefillService"
LONG = 4096
# Seconds between two calls of a client, by kind.
PAUSE = {"short": 0.02, "sparse": 0, "wrong": 0.1, "cancels": 0.2, "burst": 1, "slow_reader": 0, "impatient": 0.2,
         "striped": 0.2, "breaks": 0.2, "forgets": 0.5, "alike": 0.1}
ATTENTION = (
    Attention(preset="fast", gamma=0.1, floor_tokens=128, dense_below_tokens=512),  # sparse
    Attention(preset="balanced", gamma=0.99, dense_below_tokens=512),  # keeps so much that it runs dense
    Attention(preset="balanced", dense_below_tokens=LONG),  # too short to be sparse
    "exact",
)


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def raw_call(channel, request, timeout=30, metadata=()):
    stub = channel.unary_stream(f"{SERVICE}/Prefill", pb.PrefillRequest.SerializeToString, pb.PrefillResponse.FromString)
    return stub(request, timeout=timeout, metadata=metadata)


def raw_fetch(channel, fetch_id, from_chunk=0, timeout=30):
    """One stream of all of a prompt's KV; acknowledges nothing."""
    stub = channel.stream_stream(f"{SERVICE}/FetchKv", pb.FetchKvRequest.SerializeToString, pb.PrefillResponse.FromString)
    fetch = pb.KvFetch(fetch_id=fetch_id, from_chunk=from_chunk)
    return stub(iter([pb.FetchKvRequest(fetch=fetch)]), timeout=timeout)


def raw_release(channel, fetch_id, timeout=30):
    stub = channel.unary_unary(f"{SERVICE}/ReleaseKv", pb.ReleaseKvRequest.SerializeToString,
                               pb.ReleaseKvResponse.FromString)
    stub(pb.ReleaseKvRequest(fetch_id=fetch_id), timeout=timeout)


def code_of(call):
    """Reads a raw call to its end."""
    try:
        for _ in call:
            pass
        return "OK"
    except grpc.RpcError as error:
        return error.code().name


class Load:
    """Runs one thread for each kind of client, until stop().

    text: token ids that prompts are cut from; random ones without it.
    pace: how many times longer a client waits between two calls; larger models need more.
    """

    def __init__(self, target, text=None, pace=1):
        self.target = target
        self.text = text
        self.pace = pace
        self.codes = collections.Counter()  # of Prefill
        self.fetches_of_nothing = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._crashes = []
        kinds = [getattr(self, kind) for kind in PAUSE]
        self._threads = [threading.Thread(target=self._repeat, args=(kind,), daemon=True) for kind in kinds]
        for thread in self._threads:
            thread.start()

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"
        if self._crashes:
            raise self._crashes[0]

    def _repeat(self, kind):
        # A connection of its own for each kind.
        options = [("grpc.use_local_subchannel_pool", 1)]
        try:
            with PrefillClient(self.target, max_attempts=1, connections=1 + (kind == self.striped)) as client, \
                    grpc.insecure_channel(self.target, options) as channel:
                turn = 0
                while not self._stop.is_set():
                    for code in kind(client, channel, turn):
                        with self._lock:
                            self.codes[code] += 1
                    turn += 1
                    self._stop.wait(self.pace * PAUSE[kind.__name__])
        except Exception as error:  # shown by stop()
            self._crashes.append(error)

    def prompt(self, length, seed):
        if not self.text:
            return prompt(length, seed)
        # Not all from the same place: those would be found in the prefix cache.
        begin = seed * 37 % (len(self.text) - length + 1)
        return self.text[begin:begin + length]

    @staticmethod
    def _code(client, *arguments, **options):
        try:
            client.prefill(*arguments, **options)
            return "OK"
        except HeadstartError as error:
            return error.code.name

    def short(self, client, _, turn):
        yield self._code(client, self.prompt(64 + turn % 512, turn))

    def sparse(self, client, _, turn):
        yield self._code(client, self.prompt(LONG, turn), attention=ATTENTION[turn % len(ATTENTION)])

    def wrong(self, client, _, turn):
        yield self._code(client, [1, 1 << 30])
        yield self._code(client, [])
        yield self._code(client, [1, 2], model="another")
        yield self._code(client, [1, 2], request_id="no blanks allowed")

    def cancels(self, _, channel, turn):
        call = raw_call(channel, pb.PrefillRequest(token_ids=self.prompt(LONG, turn)))
        try:
            next(call)
            call.cancel()
            yield code_of(call)
        except grpc.RpcError as error:
            yield error.code().name

    def burst(self, _, channel, turn):
        calls = [raw_call(channel, pb.PrefillRequest(token_ids=self.prompt(256, turn))) for _ in range(24)]
        yield from map(code_of, calls)

    def slow_reader(self, _, channel, turn):
        """Takes its time over every message, and every other time stops reading altogether."""
        call = raw_call(channel, pb.PrefillRequest(token_ids=self.prompt(LONG, turn)))
        try:
            for index, _ in enumerate(call):
                time.sleep(3 if turn % 2 and index == 1 else 0.05)
            yield "OK"
        except grpc.RpcError as error:
            yield error.code().name

    def impatient(self, _, channel, turn):
        yield code_of(raw_call(channel, pb.PrefillRequest(token_ids=self.prompt(LONG, turn)), timeout=0.02))

    def striped(self, client, _, turn):
        """Two connections fetch the KV while it is computed."""
        yield self._code(client, self.prompt(LONG // 2, turn))

    def breaks(self, _, channel, turn):
        """Fetches KV on a stream that breaks after a chunk, and goes on with another one; then KV that is gone."""
        request = pb.PrefillRequest(token_ids=self.prompt(512, turn), detached=pb.DetachedKv())
        call = raw_call(channel, request)
        try:
            fetch_id = next(call).accepted.fetch_id
        except grpc.RpcError:  # refused; the code says why
            yield code_of(call)
            return
        fetch = raw_fetch(channel, fetch_id)
        with contextlib.suppress(grpc.RpcError):
            next(message for message in fetch if message.HasField("chunk"))
        fetch.cancel()
        code_of(raw_fetch(channel, fetch_id, from_chunk=1))
        code = code_of(call)
        yield code
        if code != "OK":
            return
        raw_release(channel, fetch_id)
        assert code_of(raw_fetch(channel, fetch_id)) == "NOT_FOUND"
        self.fetches_of_nothing += 1

    def alike(self, client, _, turn):
        """Prompts with the same long beginning."""
        yield self._code(client, self.prompt(1024, 0) + self.prompt(64, 1 + turn))

    def forgets(self, client, _, turn):
        """Asks for KV and never fetches it."""
        try:
            client.prefill_detached(self.prompt(256, turn), lambda location: None, readers=Part().stripes(1), lease_s=0.5)
            yield "OK"
        except HeadstartError as error:
            yield error.code.name
