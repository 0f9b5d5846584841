"""HeadstartConnector, watched: a file gets a line for each step, and the server may be asked for other tokens than vLLM has."""

import json
import os
import types

import numpy as np
from headstart.request import hash_tokens
from headstart_vllm.connector import HeadstartConnector
from headstart_vllm.scheduler_side import SchedulerSide


class WatchedConnector(HeadstartConnector):
    """kv_transfer_params: "instead": token ids that are prefilled in place of the prompt's own. "unchecked": the ranks expect
    them too; otherwise they are another prompt's KV.

    HEADSTART_STEPS names the file: {request: tokens computed} of each step that computes some.
    """

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        if self._scheduler is not None:
            self._scheduler.__class__ = _SubstitutingSide

    def build_connector_meta(self, scheduler_output):
        counts = dict(scheduler_output.num_scheduled_tokens)
        if counts and "HEADSTART_STEPS" in os.environ:
            with open(os.environ["HEADSTART_STEPS"], "a") as file:
                file.write(json.dumps(counts) + "\n")
        return super().build_connector_meta(scheduler_output)


class _SubstitutingSide(SchedulerSide):
    def _send(self, request, wish, skip_tokens):
        return super()._send(_with_other_tokens(request), wish, skip_tokens)

    def _load(self, request, *arguments):
        load = super()._load(request, *arguments)
        if not (request.kv_transfer_params or {}).get("unchecked"):
            load.token_hash = hash_tokens(np.asarray(request.prompt_token_ids, np.uint32))
        return load


def _with_other_tokens(request):
    instead = (request.kv_transfer_params or {}).get("instead")
    if instead is None:
        return request
    assert len(instead) == request.num_prompt_tokens
    names = ("request_id", "num_prompt_tokens", "num_tokens", "cache_salt")
    return types.SimpleNamespace(prompt_token_ids=instead, **{name: getattr(request, name) for name in names})
