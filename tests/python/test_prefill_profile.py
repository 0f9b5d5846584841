"""The profile of a prefill: what adds up to what, on a trace made by hand."""

import json
import pathlib
import sys

import pytest

BENCH = pathlib.Path(__file__).parents[1] / "bench/gpu"
sys.path.insert(0, str(BENCH))
import prefill_profile  # noqa: E402

CONFIG = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def event(name, start_ms, end_ms, stream=7):
    return {"name": name, "stream": stream, "start_ns": round(start_ms * 1e6), "end_ns": round(end_ms * 1e6), "bytes": 0}


@pytest.fixture
def trace(tmp_path):
    events = [
        event("nvjet_sm90_tst", 0, 4),
        event("AttentionKernel<128>", 5, 8),
        event("copy DtoH", 4, 9, stream=8),  # beside the compute stream: no time of its own
        event("SwiGluKernel", 8, 10),
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(e) for e in reversed(events)))
    return path


def test_parts_and_gaps_add_up_to_the_whole(trace):
    rows, whole = prefill_profile.summarize(prefill_profile.read_trace(trace), {})
    assert whole == pytest.approx(10)
    spent = {part: ms for part, ms, _ in rows}
    assert spent["matrix products"] == pytest.approx(4)
    assert spent["attention"] == pytest.approx(3)
    assert spent["SwiGLU"] == pytest.approx(2)
    assert spent["gaps: nothing runs"] == pytest.approx(1)
    assert sum(spent.values()) == pytest.approx(whole)


def test_every_kernel_of_ours_has_a_part():
    sources = (BENCH.parents[2] / "kernels/cuda").rglob("*.cu*")
    kernels = {word for path in sources for word in prefill_profile.re.findall(r"\b(\w+Kernel)\b", path.read_text())}
    assert len(kernels) > 15
    unknown = {name for name in kernels if prefill_profile.part_of(name) == "other"} - {"RopeTableKernel", "EmbeddingKernel", "CompareKernel"}
    assert not unknown


def test_floors_of_a_small_model():
    tokens, density = 1024, 0.5
    floors = prefill_profile.floors_ms(CONFIG, tokens, density)
    # head_dim 4: QKV in both layers, the rest in the first one only.
    products = 2 * tokens * (2 * 8 * 16 + 8 * 8 + 3 * 8 * 16)
    assert floors["matrix products"] == pytest.approx(products / prefill_profile.PEAK_TFLOPS / 1e9)
    attention = 4 * tokens * tokens / 2 * 4 * 2 * density
    assert floors["attention"] == pytest.approx(attention / prefill_profile.PEAK_TFLOPS / 1e9)
    assert prefill_profile.floors_ms(CONFIG, tokens, 1.0)["selection"] == 0


def test_draws_a_picture(trace, tmp_path):
    pytest.importorskip("matplotlib")
    events = prefill_profile.read_trace(trace)
    events.append(event("AttentionKernel<128>", 11, 12))
    rows, whole = prefill_profile.summarize(events, prefill_profile.floors_ms(CONFIG, 1024, 0.5))
    picture = tmp_path / "profile.png"
    prefill_profile.draw(events, rows, whole, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
