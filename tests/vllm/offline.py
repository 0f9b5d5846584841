"""vLLM's LLM in this process, with the watched connector."""

import json
import os
import pathlib

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engine and worker in this process: they can be watched, and start faster
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
# libgomp's barriers spin, which is very slow where others use the cores too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

TOKENS = 32


class OfflineEngine:
    """Greedy, float32: then texts are equal to the last token. scratch: a folder."""

    def __init__(self, model, scratch, *targets, **extra):
        self._steps, self._loads = scratch / "steps.jsonl", scratch / "loads.jsonl"
        os.environ["HEADSTART_STEPS"] = str(self._steps)
        from vllm import LLM
        from vllm.config import KVTransferConfig

        transfer = KVTransferConfig(
            kv_connector="WatchedConnector",
            kv_connector_module_path="watched_connector",
            kv_role="kv_consumer",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"targets": list(targets), "log": str(self._loads), **extra},
        )
        self.llm = LLM(
            model=str(model),
            dtype="float32",
            max_model_len=8192,
            enforce_eager=True,
            max_num_seqs=8,
            disable_log_stats=False,
            kv_transfer_config=transfer,
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler

    @property
    def side(self):
        return self.scheduler.connector._scheduler

    def params(self, headstart, tokens=TOKENS, **others):
        from vllm import SamplingParams

        extra = {} if headstart is None else {"extra_args": {"kv_transfer_params": {"headstart": headstart, **others}}}
        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **extra)

    def generate(self, prompts, headstart=None, *, reset=True, salt=None, tokens=TOKENS, **others):
        """Outputs. headstart: the requests' wish; None: vLLM alone. reset: vLLM's prefix cache is empty before."""
        if reset:
            assert self.llm.reset_prefix_cache()
        self.steps()
        self.loads()
        salted = {} if salt is None else {"cache_salt": salt}
        inputs = [{"prompt_token_ids": list(prompt), **salted} for prompt in prompts]
        return self.llm.generate(inputs, self.params(headstart, tokens, **others), use_tqdm=False)

    def text(self, prompt, headstart=None, **options):
        """Token ids of one prompt's continuation."""
        return ids(self.generate([prompt], headstart, **options)[0])

    def steps(self):
        """{request: tokens} of the steps since the last call."""
        return _take_lines(self._steps)

    def loads(self):
        return _take_lines(self._loads)

    def prefill_tokens(self):
        """What vLLM computed of each prompt that it began since then: short ones in one step."""
        first = {}
        for step in self.steps():
            for request, count in step.items():
                first.setdefault(request, count)
        return list(first.values())

    def free_blocks(self):
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def ids(output):
    return list(output.outputs[0].token_ids)


def _take_lines(path: pathlib.Path):
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("")
    return [json.loads(line) for line in lines]
