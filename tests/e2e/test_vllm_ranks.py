"""Both halves of vLLM's connector against a real server, without vLLM: ranks of one prefill, each in a process of its own."""

import os
import pathlib
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from against_transformers import random_prompt
from tiny_models import save_tiny_model

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "python"))
import fake_vllm  # before what imports vllm
from fake_server import wait_until

from headstart_vllm.options import Options
from headstart_vllm.scheduler_side import SchedulerSide

# Several pieces of the server, a ragged end; blocks of vLLM in disorder.
TOKENS, PIECE, BLOCK = 700, 256, 16
BLOCK_IDS = [int(block) for block in np.random.default_rng(3).permutation(64)[: -(-TOKENS // BLOCK)]]


@pytest.fixture(scope="module")
def server(serve, tmp_path_factory):
    model = save_tiny_model("qwen3", tmp_path_factory.mktemp("model") / "qwen3", torch.bfloat16)
    with serve(model, "--piece-tokens", str(PIECE)) as running:
        yield running


def start_rank(rank, job):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent / "python"), *sys.path])}
    process = subprocess.Popen([sys.executable, HERE / "vllm_rank.py"], stdin=subprocess.PIPE, env=environment)
    pickle.dump({**job, "rank": rank, "file": job["file"](rank)}, process.stdin)
    process.stdin.close()
    return process


@pytest.mark.parametrize("skip_tokens", [0, 5 * BLOCK])
def test_ranks_in_processes_of_their_own_have_the_whole_prompt(server, tmp_path, skip_tokens):
    extra = {"targets": [server.target]}
    with server.client() as client:
        info = client.model_info()
        prompt = random_prompt(info.vocab_size, TOKENS)
        kv = client.prefill(prompt, attention="exact").kv
    layout = info.kv_layout
    rope = {"rope_theta": layout.rope.theta, "rope_type": layout.rope.type, "factor": layout.rope.factor}
    config = {
        "shape": (layout.num_layers, layout.num_kv_heads, layout.head_dim),
        "ranks": layout.num_kv_heads,
        "block_size": BLOCK,
        "num_blocks": 64,
        "hf_text_config": types.SimpleNamespace(rope_parameters=rope),
    }
    request = fake_vllm.Request(prompt_token_ids=[int(token) for token in prompt])
    scheduler = SchedulerSide(fake_vllm.make_config(extra, **config), Options.of_config(extra), fails=True)
    wait_until(lambda: scheduler.num_tokens_to_load(request, skip_tokens)[0] is not None)
    blocks = types.SimpleNamespace(get_block_ids=lambda: (BLOCK_IDS,))
    scheduler.on_blocks(request, blocks, scheduler.num_tokens_to_load(request, skip_tokens)[0])
    job = {"extra": extra, "config": config, "request_id": request.request_id, "metadata": scheduler.take_metadata()}
    job["file"] = lambda rank: str(tmp_path / f"{rank}.npy")
    ranks = [start_rank(rank, job) for rank in range(layout.num_kv_heads)]
    assert [rank.wait(120) for rank in ranks] == [0] * layout.num_kv_heads
    scheduler.on_worker_output(fake_vllm.Output({request.request_id}, set()))
    scheduler.shutdown()
    received = np.concatenate([np.load(job["file"](rank)) for rank in range(layout.num_kv_heads)], axis=2)
    wanted = torch.from_numpy(kv.view(np.int16)).view(torch.bfloat16).double().numpy()
    np.testing.assert_array_equal(received, wanted[:, :, :, skip_tokens : TOKENS - 1])
    with server.client() as client:
        assert client.loads().leases == 0
