"""headstart_vllm: which prompts a server is asked for, what is refused at the start, salts, counters, memory."""

import hashlib

import fake_vllm  # before what imports vllm
import pytest
from headstart.v1 import prefill_pb2 as pb

import headstart_vllm
from fake_server import LAYERS, TOKENS
from fake_vllm import Engine, Request
from vllm_testing import LAST, Keeper, ask, make_engine, receiver


@pytest.mark.parametrize(
    "params, reason",
    [
        (None, "not_asked"),
        ({"headstart": False}, "not_asked"),
        ({"headstart": {"target": "10.0.0.1:22"}}, "bad_params"),
        ({"headstart": {"attention": "approximate"}}, "bad_params"),
        ({"headstart": {"tagret": "x"}}, "bad_params"),
        ({"headstart": 7}, "bad_params"),
        ({"headstart": {"attention": "fast"}}, "sparse_without_salt"),
        ({"headstart": {"attention": {"preset": "fast", "gamma": 0.5}}}, "sparse_without_salt"),
    ],
)
def test_requests_that_are_computed_here(make_engine, params, reason):
    engine = make_engine("127.0.0.1:1")
    assert ask(engine, Request(kv_transfer_params=params)) == (0, False)
    engine.step()
    assert engine.counts == {("requests", f"here_{reason}"): 1}


@pytest.mark.parametrize(
    "change", [{"prompt_token_ids": None}, {"lora_request": 1}, {"mm_features": [1]}, {"skip_reading_prefix_cache": True}]
)
def test_requests_that_headstart_does_not_compute(make_engine, monkeypatch, change):
    engine = make_engine("127.0.0.1:1")
    monkeypatch.setattr(Request, "num_prompt_tokens", len(TOKENS))
    assert ask(engine, Request(**change)) == (0, False)
    engine.step()
    assert engine.counts == {("requests", "here_unfit"): 1}


@pytest.mark.parametrize("least, num_computed, loads", [(LAST, 0, True), (LAST + 1, 0, False), (LAST - 4, 4, True), (LAST, 4, False)])
def test_long_prompts_are_loaded_without_being_asked_for(receiver, make_engine, least, num_computed, loads):
    with Keeper().running() as target:
        engine = make_engine(target, {"min_prompt_tokens": least})
        answer = ask(engine, Request(kv_transfer_params=None), num_computed)
    assert answer == ((LAST - num_computed, True) if loads else (0, False))


def test_a_prompt_of_one_token_and_one_that_is_here_are_nothing_to_load(make_engine):
    engine = make_engine("127.0.0.1:1")
    assert ask(engine, Request(prompt_token_ids=[7])) == (0, False)
    assert ask(engine, Request(), LAST) == (0, False)


@pytest.mark.parametrize("attention", ["fast", {"preset": "fast", "gamma": 0.5}])
def test_sparse_kv_needs_a_salt_of_its_own_or_no_cache(receiver, make_engine, attention):
    keeper = Keeper()
    wish = {"headstart": {"attention": attention}}
    salt = headstart_vllm.cache_salt(attention, "tenant")
    with keeper.running() as target:
        assert ask(make_engine(target), Request(wish, cache_salt=salt)) == (LAST, True)
        assert ask(make_engine(target, prefix_caching=False), Request(wish)) == (LAST, True)
        assert ask(make_engine(target), Request(wish, cache_salt="tenant")) == (0, False)
    assert keeper.requests[0].cache_salt == hashlib.sha256(salt.encode()).digest()
    assert keeper.requests[0].attention.preset == pb.ATTENTION_PRESET_FAST


def test_salts_tell_ways_of_computing_apart():
    salts = {headstart_vllm.cache_salt(a) for a in ("exact", "fast", "balanced", {"gamma": 0.5}, {"gamma": 0.6})}
    assert len(salts) == 5
    assert headstart_vllm.cache_salt("exact", "t") == "t"
    assert headstart_vllm.cache_salt("fast", "t") == "headstart-fast:t"


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"tagrets": ["a"]}, "unknown tagrets"),
        ({"targets": "a:1"}, "no list of strings"),
        ({"targets": []}, "targets is empty"),
        ({"attention": "approximate"}, "is not one of"),
        ({"attention": {"gama": 1}}, "gama"),
        ({"max_loads": 0}, "max_loads=0 is less than 1"),
        ({"targets": [], "allow_any_target": True, "min_prompt_tokens": 5}, "min_prompt_tokens needs targets"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused_at_the_start(make_engine, extra, message):
    with pytest.raises(ValueError, match=message):
        make_engine("127.0.0.1:1", extra)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_mla": True}, "MLA"),
        ({"hf_text_config": object()}, "no rope_theta"),
        ({"get_num_layers": lambda parallel: LAYERS + 1}, "expected one for each of 4 layers"),
    ],
)
def test_a_model_that_headstart_has_no_kv_for_is_refused_at_the_start(change, message):
    with pytest.raises(ValueError, match=message):
        Engine({"targets": ["127.0.0.1:1"]}, **change)


def test_ropes_of_old_and_new_configurations():
    from headstart_vllm.model import Rope

    class Old:
        rope_theta = 500000.0
        rope_scaling = {"type": "linear", "factor": 8}

    class New:
        rope_parameters = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}

    assert Rope.of_config(Old) == Rope(500000.0, "linear", 8.0)
    assert Rope.of_config(New) == Rope(500000.0, "llama3", 8.0)


def test_the_connector_is_registered_once(monkeypatch):
    monkeypatch.setattr(fake_vllm.KVConnectorFactory, "registry", {})
    headstart_vllm.register()
    headstart_vllm.register()
    assert fake_vllm.KVConnectorFactory.registry == {"HeadstartConnector": ("headstart_vllm.connector", "HeadstartConnector")}


def test_counters_add_up_and_reach_prometheus():
    from headstart_vllm.connector import HeadstartConnector
    from headstart_vllm.stats import HeadstartStats

    total = HeadstartConnector.build_kv_connector_stats({"requests": {"loaded": 2}})
    total.aggregate(HeadstartStats({"requests": {"loaded": 1, "failed": 1}, "tokens": {"loaded": 10}}))
    assert total.data == {"requests": {"loaded": 3, "failed": 1}, "tokens": {"loaded": 10}}
    assert total.reduce()["Headstart tokens loaded"] == 10
    seen = {}

    class Counter:
        def __init__(self, name, documentation, labelnames):
            self.name = name

        def labels(self, *values):
            self.at = (self.name, *values)
            return self

        def inc(self, value):
            seen[self.at] = value

    metrics = HeadstartConnector.build_prom_metrics(None, {"counter": Counter}, ["engine"], {0: ["0"]})
    metrics.observe(total.data)
    assert seen["vllm:headstart_requests", "0", "loaded"] == 3 and seen["vllm:headstart_tokens", "0", "loaded"] == 10


def test_host_memory_is_used_again_and_not_kept_without_end():
    from headstart_vllm.host_memory import HostMemory

    memory = HostMemory(keep_bytes=20 << 20, pin=False)
    with memory.lend(1000) as first, memory.lend(17 << 20) as second:
        addresses = {first.data_ptr(), second.data_ptr()}
        assert len(addresses) == 2 and first.numel() >= 1000 and second.numel() >= 17 << 20
    with memory.lend(1000), memory.lend(1000):
        kept = sum(free.numel() for free in memory._free)
    assert kept == 0
    with memory.lend(1000) as again:
        assert again.numel() == 16 << 20
