"""An unmodified vLLM decodes what Headstart prefilled: the same text, one prompt token computed; no lease left (see the fixture
`server`)."""

import pytest
from offline import ids

EXACT = {"attention": "exact"}


@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 2000, 8000])
def test_the_text_is_vllms_own_and_one_token_is_computed(engine, text, length):
    prompt = text[100 : 100 + length]
    own = engine.text(prompt)
    output = engine.generate([prompt], EXACT)[0]
    assert ids(output) == own
    assert engine.prefill_tokens() == [1]
    assert output.num_cached_tokens == length - 1
    for load in engine.loads():
        print(f"{length} tokens: load {load['load_s'] * 1e3:.0f} ms, behind the last chunk {load['behind_s'] * 1e3:.1f} ms, "
              f"server's TTFT {load['server_ttft_s'] * 1e3:.0f} ms")


def test_the_text_follows_the_kv_not_the_tokens(engine, text):
    """All of the prompt came over the wire: garbage in vLLM, KV of B, text of B."""
    b = text[3000:3300]
    a, garbage = text[1000:1300], [5] * (len(b) - 1) + [b[-1]]
    own_a, own_b, own_garbage = engine.text(a), engine.text(b), engine.text(garbage)
    assert engine.text(garbage, EXACT, instead=b, unchecked=True) == own_b != own_garbage
    assert engine.text(a, EXACT, instead=b, unchecked=True) != own_a


def test_kv_of_other_tokens_is_refused(engine, text):
    prompt = text[1000:1300]
    own = engine.text(prompt)
    assert engine.text(prompt, EXACT, instead=text[3000:3300]) == own
    (load,) = engine.loads()
    assert "token_hash" in load["error"]


def test_eight_at_once(engine, text):
    prompts = [text[i * 500 : i * 500 + 200 + 37 * i] for i in range(8)]
    own = [ids(output) for output in engine.generate(prompts)]
    assert [ids(output) for output in engine.generate(prompts, EXACT)] == own
    assert engine.prefill_tokens() == [1] * 8
    assert len(engine.loads()) == 8
