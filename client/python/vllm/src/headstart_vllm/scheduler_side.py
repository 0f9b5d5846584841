"""The connector's half in vLLM's scheduler: decides which prompts a server computes, and keeps them until the ranks have them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import enum
import hashlib
import os
import re
import uuid

import numpy as np
from headstart import native
from headstart.request import hash_tokens
from vllm.logger import init_logger

from headstart_vllm.clients import Clients
from headstart_vllm.metadata import Load, Metadata
from headstart_vllm.model import MAX_READERS, Model
from headstart_vllm.options import Options, Wish, attention_of
from headstart_vllm.provenance import may_be_cached
from headstart_vllm.remote_prefill import RemotePrefill, State
from headstart_vllm.stats import HeadstartStats

logger = init_logger("vllm.headstart")  # vLLM shows what is under its own name

_NOT_IN_A_REQUEST_ID = re.compile(r"[^A-Za-z0-9._:-]")
_MAX_REQUEST_ID = 128
_STRIPE_BYTES = 32 << 20
_MAX_STRIPES = 8


class Phase(enum.Enum):
    ASKING = enum.auto()  # no blocks yet
    LOADING = enum.auto()
    LOADED = enum.auto()
    HERE = enum.auto()  # it is computed here


@dataclasses.dataclass
class Prompt:
    """Of a request that vLLM has. load: of the phase LOADING."""

    phase: Phase
    remote: RemotePrefill | None = None
    load: Load | None = None
    failed: bool = False
    over: bool = False  # the request is over, its load is not


class SchedulerSide:
    """Its methods are called by the scheduler, one at a time, and do not wait."""

    def __init__(self, vllm_config, options: Options, fails: bool) -> None:
        """fails: a request whose KV can't be had is to fail, not to be computed here."""
        self.stats = HeadstartStats()
        self._options = options
        self._fails = fails
        self._model = Model.of_vllm(vllm_config, options.model_hash, options.kv_dtype)
        self._block_size = vllm_config.cache_config.block_size
        self._caches = bool(vllm_config.cache_config.enable_prefix_caching)
        self._clients = Clients(options)
        # Ids must be unique among all decode nodes of a server; the start also tells the nodes apart in its log.
        self._instance = uuid.uuid4().hex[:8]
        self._num_asked = 0
        self._prompts: dict[str, Prompt] = {}
        self._new: list[Load] = []
        self._aborted: list[str] = []
        self._senders = concurrent.futures.ThreadPoolExecutor(options.max_loads, "headstart-prefill")
        self._releasers = concurrent.futures.ThreadPoolExecutor(4, "headstart-release")

    def num_tokens_to_load(self, request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Of the prompt, behind those that are here. None: not known yet."""
        count = _end(request) - num_computed_tokens
        if count <= 0:
            return 0, False
        prompt = self._prompts.get(request.request_id)
        if prompt is None or prompt.phase is Phase.LOADED:  # LOADED: it was preempted
            prompt = self._prompts[request.request_id] = self._begin(request, num_computed_tokens, count)
        elif prompt.phase is Phase.ASKING and num_computed_tokens < prompt.remote.skip_tokens:
            self._abandon(prompt.remote)  # pages that were to be skipped have left the cache
            prompt.remote = self._send(request, prompt.remote.wish, num_computed_tokens)
        return self._answer(request.request_id, prompt, count)

    def on_blocks(self, request, blocks, num_external_tokens: int) -> None:
        prompt = self._prompts.get(request.request_id)
        if prompt is None or prompt.phase is not Phase.ASKING:
            return  # not ours, or the second call, after the load
        if num_external_tokens == 0:
            self._compute_here(prompt, "not_needed")
            return
        end = _end(request)
        prompt.phase = Phase.LOADING
        prompt.load = self._load(request, prompt.remote, list(blocks.get_block_ids()[0]), end - num_external_tokens, end)
        self._new.append(prompt.load)

    def take_metadata(self) -> Metadata:
        metadata = Metadata(self._new, self._aborted)
        self._new, self._aborted = [], []
        return metadata

    def on_worker_output(self, output) -> None:
        # The blocks of a load that failed may come before the load is reported as finished, never after.
        invalid = output.invalid_block_ids or set()
        loading = [prompt for prompt in self._prompts.values() if prompt.phase is Phase.LOADING]
        for prompt in loading if invalid else ():
            if not prompt.over and not invalid.isdisjoint(prompt.load.own_blocks(self._block_size)):
                prompt.failed = True
        for request_id in output.finished_recving or ():
            if request_id in self._prompts:
                self._on_load_end(request_id, self._prompts[request_id])

    def on_finished(self, request_id: str) -> None:
        """The request is over. Where its load is not, vLLM keeps the blocks until the ranks have reported it."""
        prompt = self._prompts.get(request_id)
        if prompt is None:
            return
        if prompt.phase is Phase.LOADING:
            prompt.over = True
            self._aborted.append(request_id)
            self._abandon(prompt.remote)
            return
        if prompt.phase is Phase.ASKING:
            self.stats.count("requests", "aborted")
            self._abandon(prompt.remote)
        del self._prompts[request_id]

    def shutdown(self) -> None:
        for prompt in self._prompts.values():
            if prompt.phase in (Phase.ASKING, Phase.LOADING):
                self._abandon(prompt.remote)
        self._senders.shutdown(wait=True, cancel_futures=True)
        self._releasers.shutdown(wait=True)
        self._clients.close()

    # ---- beginning

    def _begin(self, request, num_computed_tokens: int, count: int) -> Prompt:
        try:
            wish, why = self._wish(request, count)
        except ValueError as error:
            logger.warning("%s: computed here: %s", request.request_id, error)
            wish, why = None, "bad_params"
        if wish is None:
            self.stats.count("requests", f"here_{why}")
            return Prompt(Phase.HERE)
        return Prompt(Phase.ASKING, self._send(request, wish, num_computed_tokens))

    def _wish(self, request, count: int) -> tuple[Wish | None, str]:
        """Or why not."""
        wish = Wish.of_params(request.kv_transfer_params, self._options)
        if wish is None:
            return None, "not_asked"
        if not wish.asked_for and count < self._options.min_prompt_tokens:
            return None, "short"
        if not _can_be_loaded(request):
            return None, "unfit"
        if self._caches and not may_be_cached(wish.attention, request.cache_salt):
            logger.warning(
                "%s: computed here: KV of attention %s would enter the prefix cache as if it were exact; "
                "give the request cache_salt=headstart_vllm.cache_salt(...), or turn prefix caching off",
                request.request_id,
                wish.attention,
            )
            return None, "sparse_without_salt"
        return wish, ""

    def _send(self, request, wish: Wish, skip_tokens: int) -> RemotePrefill:
        remote = RemotePrefill(wish, skip_tokens)
        options, prompt = self._options, request.prompt_token_ids
        readers = self._model.readers(self._num_stripes(request))
        values = {
            "attention": attention_of(wish.attention),
            "skip_tokens": skip_tokens,
            "kv_dtype": self._model.kv_dtype,
            "prefix_reuse": options.prefix_reuse,
            "cache_salt": hashlib.sha256(request.cache_salt.encode()).digest() if request.cache_salt else b"",
        }
        self._num_asked += 1
        name = _NOT_IN_A_REQUEST_ID.sub("_", f"{self._instance}-{self._num_asked}-{request.request_id}")[:_MAX_REQUEST_ID]

        def send() -> None:
            client = self._clients.of(wish.target)
            ids = np.asarray(prompt, np.uint32)  # on this thread: of a long prompt that takes milliseconds
            remote.token_hash = hash_tokens(ids)
            if options.max_wait_s:
                estimate = client.estimate(ids, deadline_s=options.timeout_s, **values)
                if remote.declines(estimate, options.max_wait_s):
                    return
            values.update(request_id=name, readers=readers, lease_s=options.lease_s, cancel=remote.cancel)
            client.prefill_detached(ids, remote.on_accepted, **values)

        self._senders.submit(remote.run, send)
        return remote

    def _num_stripes(self, request) -> int:
        if self._options.connections:
            wanted = self._options.connections
        elif native.available():
            wanted = min(-(-self._model.rank_bytes(request.num_prompt_tokens) // _STRIPE_BYTES), (os.cpu_count() or 2) // 2)
        else:
            wanted = 1  # one thread at a time runs Python
        return max(1, min(wanted, _MAX_STRIPES, MAX_READERS // self._model.num_ranks))

    # ---- going on

    def _answer(self, request_id: str, prompt: Prompt, count: int) -> tuple[int | None, bool]:
        if prompt.phase is Phase.HERE:
            return 0, False
        remote, state = prompt.remote, prompt.remote.state
        if state is State.ASKED:
            return None, False
        if state is State.ACCEPTED:
            return count, True
        if state is State.DECLINED:
            return self._compute_here(prompt, remote.declined)
        if self._fails:
            return count, True  # a load that fails is how a connector fails a request
        logger.warning("%s: computed here: no KV from %s: %s", request_id, remote.wish.target, remote.error)
        return self._compute_here(prompt, "refused")

    def _compute_here(self, prompt: Prompt, why: str) -> tuple[int, bool]:
        self.stats.count("requests", f"here_{why}")
        self._abandon(prompt.remote)
        prompt.phase = Phase.HERE
        return 0, False

    def _load(self, request, remote: RemotePrefill, block_ids: list[int], begin: int, end: int) -> Load:
        load = Load(request.request_id, block_ids, begin, end, target=remote.wish.target)
        if remote.state is not State.ACCEPTED:
            return dataclasses.replace(load, error=str(remote.error))
        return dataclasses.replace(
            load,
            location=remote.location,
            num_stripes=self._num_stripes(request),
            num_prompt_tokens=request.num_prompt_tokens,
            token_hash=remote.token_hash,
        )

    def _on_load_end(self, request_id: str, prompt: Prompt) -> None:
        """All ranks have reported the load."""
        if prompt.over:
            self.stats.count("requests", "aborted")
            del self._prompts[request_id]
            return
        load, prompt.load = prompt.load, None
        if prompt.failed:
            self.stats.count("requests", "failed")
            self._abandon(prompt.remote)
            prompt.phase = Phase.HERE  # vLLM asks again (policy "recompute"), and must not get another load, and another, ...
            return
        self.stats.count("requests", "loaded")
        self.stats.count("tokens", "loaded", load.end - load.begin)
        self.stats.count("tokens", "skipped", load.begin)
        self._releasers.submit(prompt.remote.release, self._clients.of)
        prompt.phase = Phase.LOADED

    def _abandon(self, remote: RemotePrefill) -> None:
        """It ends before its time, or has ended badly."""
        remote.cancel.cancel()
        self._releasers.submit(remote.release, self._clients.of)


def _end(request) -> int:
    """Tokens that can be loaded: those of the prompt, but one of the sequence stays for vLLM to compute."""
    return min(request.num_prompt_tokens, request.num_tokens - 1)


def _can_be_loaded(request) -> bool:
    """Token ids alone, of the model alone, and nothing asked of the prompt's own positions."""
    only_tokens = request.prompt_token_ids is not None and not request.mm_features and request.lora_request is None
    return only_tokens and request.pooling_params is None and not getattr(request, "skip_reading_prefix_cache", False)
