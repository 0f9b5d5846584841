"""The Python client against streams that are damaged, or that answer another question: nothing of them is taken."""

import threading

import google_crc32c
import grpc
import pytest
from headstart import Expectation, HeadstartDataLoss, HeadstartError
from headstart.wire import check_completion, chunk_crc32c
from headstart.v1 import prefill_pb2 as pb

from fake_server import change_completed, make_stream


def damaged(change, kv=None):
    """A right stream with `change(stream)` applied to it."""
    stream = make_stream(kv)
    return change(stream) or stream


def chunks_of(stream):
    return [message.chunk for message in stream if message.HasField("chunk")]


def flip_a_byte(stream):
    chunk = chunks_of(stream)[2]
    data = bytearray(chunk.data)
    data[17] ^= 0x40
    chunk.data = bytes(data)


def flip_a_header_field(stream):
    first, second = chunks_of(stream)[:2]
    first.layer, second.layer = second.layer, first.layer  # right bytes, wrong place


def resign(chunk):
    chunk.crc32c = chunk_crc32c(chunk, chunk.data)


def set_in_chunk(position, **fields):
    def change(stream):
        chunk = chunks_of(stream)[position]
        for name, value in fields.items():
            setattr(chunk, name, value)
        resign(chunk)

    return change


def shorten_data(stream):
    chunk = chunks_of(stream)[0]
    chunk.data = chunk.data[:-2]
    resign(chunk)


def repeat_a_chunk(stream):
    again = pb.KvChunk()
    again.CopyFrom(chunks_of(stream)[0])
    again.index = 1
    resign(again)
    for chunk in chunks_of(stream)[1:]:
        chunk.index += 1
        resign(chunk)
    return [*stream[:3], pb.PrefillResponse(chunk=again), *stream[3:]]


def in_completed(change):
    return lambda stream: change_completed(stream, change)


def drop_last_chunk_honestly(stream):
    dropped = stream.pop(-2).chunk

    def count_it_out(completed):
        completed.num_chunks -= 1
        completed.kv_bytes -= len(dropped.data)

    in_completed(count_it_out)(stream)


def in_manifest(**fields):
    def change(stream):
        manifest = stream[1].manifest
        for name, value in fields.items():
            setattr(manifest.layout if hasattr(manifest.layout, name) else manifest, name, value)

    return change


def set_completed(**fields):
    return in_completed(lambda completed: [setattr(completed, name, value) for name, value in fields.items()])


def density(values):
    def change(completed):
        completed.manifest.layer_density[:] = values

    return in_completed(change)


def flip_a_bit_of_completed(stream):
    checked = stream[-1].completed
    checked.completed = checked.completed[:-1] + bytes([checked.completed[-1] ^ 1])


def garbage_with_a_right_checksum(stream):
    stream[-1].completed.CopyFrom(check_completion(pb.Completed()))
    stream[-1].completed.completed = b"\xff"
    stream[-1].completed.crc32c = google_crc32c.value(b"\xff")


DAMAGE = {
    "flipped byte": (flip_a_byte, "crc32c"),
    "flipped header": (flip_a_header_field, "crc32c"),
    "wrong checksum": (lambda s: setattr(chunks_of(s)[4], "crc32c", chunks_of(s)[4].crc32c ^ 1), "crc32c"),
    "index gap": (set_in_chunk(1, index=2), "index"),
    "lost chunk": (lambda s: s[:3] + s[4:], "index"),
    "repeated chunk": (repeat_a_chunk, "goes back behind token 8"),
    "swapped chunks": (lambda s: [*s[:2], s[3], s[2], *s[4:]], "index"),
    "layer too high": (set_in_chunk(0, layer=3), "only 3 layers"),
    "heads too many": (set_in_chunk(0, kv_head_count=3), "3 heads from 0 on, not 2"),
    "no heads": (set_in_chunk(0, kv_head_count=0), "0 heads from 0 on, not 2"),
    "one head of two": (set_in_chunk(0, kv_head_begin=1, kv_head_count=1), "1 heads from 1 on, not 2"),
    "no tokens": (set_in_chunk(0, token_count=0), "ends at token 0"),
    "tokens beyond the prompt": (set_in_chunk(3, token_count=4), "ends at token 12; tokens 0 to 11 come"),
    "huge token count": (set_in_chunk(0, token_count=0xFFFFFFFF), "ends at token 4294967295"),
    "not whole blocks": (set_in_chunk(0, token_count=7), "in blocks of 4"),
    "begins inside a block": (set_in_chunk(0, token_begin=2, token_count=6), "in blocks of 4"),
    "gap in a layer": (set_in_chunk(0, token_begin=4, token_count=4), "data has"),
    "short data": (shorten_data, "data has"),
    "truncated": (lambda s: s[:-1], "without `completed`"),
    "nothing": (lambda s: [pb.PrefillResponse()], "0 known events"),
    "not a message": (lambda s: [s[0], b"\x22\xff"], "no PrefillResponse"),
    "cut chunk": (lambda s: [*s[:2], s[2].SerializeToString()[:-1]], "no PrefillResponse"),
    "completed too early": (drop_last_chunk_honestly, "completed after 1920 of 2112 KV bytes"),
    "completed without manifest": (lambda s: [s[0], s[-1]], "`completed` came out of order"),
    "chunk before manifest": (lambda s: [s[0], s[2]], "chunk.* came out of order"),
    "manifest before accepted": (lambda s: s[1:], "`manifest` came out of order"),
    "accepted twice": (lambda s: [s[0], *s], "`accepted` came out of order"),
    "manifest twice": (lambda s: [*s[:2], *s[1:]], "`manifest` came out of order"),
    "goes on after completed": (lambda s: [*s, s[-1]], "`completed` came out of order"),
    "wrong chunk total": (set_completed(num_chunks=99), "99 chunks, 2112 bytes; received 6"),
    "wrong byte total": (set_completed(kv_bytes=1), "6 chunks, 1 bytes; received 6 and 2112"),
    "flipped bit of completed": (flip_a_bit_of_completed, "completed: crc32c"),
    "garbage for completed": (garbage_with_a_right_checksum, "no `Completed`"),
    "no first token": (in_completed(lambda c: c.ClearField("first_token")), "first_token"),
    "other final manifest": (in_completed(lambda c: setattr(c.manifest, "model_hash", "cd" * 32)), "not the one"),
    "too few densities": (density([1.0]), "layer_density"),
    "density of zero": (density([1.0, 0.0, 1.0]), "layer_density"),
    "density not a number": (density([1.0, float("nan"), 1.0]), "layer_density"),
    "other token hash": (in_manifest(token_hash=b"x" * 32), "token_hash"),
    "other prompt length": (in_manifest(num_tokens=10), "num_tokens"),
    "no layers": (in_manifest(num_layers=0), "num_layers"),
    "too many layers": (in_manifest(num_layers=1 << 20), "num_layers"),
    "absurd head_dim": (in_manifest(head_dim=1 << 31), "head_dim"),
    "unknown dtype": (in_manifest(dtype=9), "dtype"),
    "no block size": (in_manifest(block_tokens=0), "block_tokens"),
}


@pytest.mark.parametrize("change, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_data_loss(prefill, change, message):
    with pytest.raises(HeadstartDataLoss, match=message) as caught:
        prefill(damaged(change))
    assert caught.value.code == grpc.StatusCode.DATA_LOSS


@pytest.mark.parametrize(
    "options, message",
    [
        ({"request_id": "r2"}, "request_id=r1, expected r2"),
        ({"model": "other"}, "model=fake, expected other"),
        ({"kv_dtype": "f32"}, "dtype"),
        ({"attention": "exact"}, "attention algorithm"),
        ({"expected": Expectation(model_hash="00" * 32)}, "model_hash"),
        ({"expected": Expectation(num_layers=4)}, "num_layers=3, expected 4"),
        ({"expected": Expectation(num_kv_heads=4)}, "num_kv_heads"),
        ({"expected": Expectation(head_dim=64)}, "head_dim"),
    ],
)
def test_answer_to_another_question_is_data_loss(prefill, options, message):
    with pytest.raises(HeadstartDataLoss, match=message):
        prefill(make_stream(), **options)


def test_kv_beyond_the_limit_is_refused_before_it_is_allocated(prefill):
    with pytest.raises(HeadstartError, match="max_kv_bytes=1000") as caught:
        prefill(make_stream(), client_options={"max_kv_bytes": 1000})
    assert caught.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_damage_cancels_the_call(prefill):
    gone = threading.Event()

    def watch(context):
        assert context.add_callback(gone.set)

    stream = make_stream()
    flip_a_byte(stream)
    with pytest.raises(HeadstartDataLoss):
        prefill([watch, *stream[:-1], lambda _: gone.wait(10)])
    assert gone.is_set()
