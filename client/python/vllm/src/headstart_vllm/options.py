"""What `kv_connector_extra_config` and a request's `kv_transfer_params` say."""

from __future__ import annotations

import dataclasses

from headstart import Attention, Tls

from headstart_vllm.provenance import EXACT

_PRESETS = ("exact", "paper", "balanced", "fast")


@dataclasses.dataclass(frozen=True)
class Options:
    """Keys of `kv_connector_extra_config`.

    targets: servers that may be asked, as gRPC names them; the first one is for requests that name none.
    allow_any_target: requests may name others. Whoever may send requests then makes this machine connect to where they like.
    min_prompt_tokens: prompts that lack at least so many tokens use Headstart without being asked to; 0: only on request.
    max_wait_s: prompts whose KV is predicted to take longer are computed here; 0: the server is not asked for a prediction.
    attention: of requests that name none; a preset, or the fields of headstart.Attention.
    prefix_reuse: of the server's prefix cache, "same", "dense" or "none".
    kv_dtype: on the wire, "bf16", "f16", "f32" or "fp8_e4m3"; empty: what vLLM computes in, and a server that computes in
        another refuses.
    model_hash: only KV of this model, as the server's GetModelInfo names it; empty: shape and RoPE are compared.
    timeout_s: of one prefill with its transfer. lease_s: how long KV waits for a rank that does not fetch.
    max_loads: prompts at the server at a time; others wait their turn.
    connections: of one prompt and rank; 0: by the size of its KV.
    host_memory_bytes: that is kept for the next prompts (pinned where there is a GPU).
    tls: fields of headstart.Tls. allowed_fetch_hosts: see headstart.PrefillClient.
    log: a file that gets a line of JSON for each load.
    """

    targets: tuple[str, ...] = ()
    allow_any_target: bool = False
    min_prompt_tokens: int = 0
    max_wait_s: float = 0.0
    attention: str | dict = EXACT
    prefix_reuse: str = "same"
    kv_dtype: str = ""
    model_hash: str = ""
    timeout_s: float = 120.0
    lease_s: float | None = None
    max_loads: int = 32
    connections: int = 0
    host_memory_bytes: int = 4 << 30
    tls: dict | None = None
    allowed_fetch_hosts: tuple[str, ...] = ()
    log: str = ""

    @classmethod
    def of_config(cls, extra: dict) -> Options:
        """ValueError says which key is wrong."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(extra) - known)
        if unknown:
            raise ValueError(f"kv_connector_extra_config: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        lists = {name: _strings(name, extra[name]) for name in ("targets", "allowed_fetch_hosts") if name in extra}
        options = cls(**{**extra, **lists})
        options._check()
        return options

    def client_options(self) -> dict:
        """Of headstart.PrefillClient."""
        tls = None if self.tls is None else Tls(**self.tls)
        return {"tls": tls, "timeout_s": self.timeout_s, "allowed_fetch_hosts": self.allowed_fetch_hosts}

    def _check(self) -> None:
        attention_of(self.attention)
        for name, least in (("min_prompt_tokens", 0), ("max_wait_s", 0), ("max_loads", 1), ("connections", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"kv_connector_extra_config: {name}={getattr(self, name)} is less than {least}")
        if not self.targets and not self.allow_any_target:
            raise ValueError("kv_connector_extra_config: targets is empty, and requests may not name any")
        if self.min_prompt_tokens and not self.targets:
            raise ValueError("kv_connector_extra_config: min_prompt_tokens needs targets")


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a request wants of Headstart: `kv_transfer_params["headstart"]`, an object with these keys, none of them needed."""

    target: str
    attention: str | dict
    asked_for: bool  # by the request itself

    @classmethod
    def of_params(cls, params: dict | None, options: Options) -> Wish | None:
        """None: the request says no, or nothing where nothing means no. ValueError: it can't be had."""
        wish = (params or {}).get("headstart")
        if wish is False or (wish is None and not options.min_prompt_tokens):
            return None
        asked_for = wish is not None
        fields = wish if isinstance(wish, dict) else {}
        if not isinstance(wish, dict | bool | None) or set(fields) - {"target", "attention"}:
            raise ValueError(f"kv_transfer_params: headstart={wish!r} is no object of target and attention, true or false")
        target = fields.get("target") or next(iter(options.targets), None)
        if target not in options.targets and not (target and options.allow_any_target):
            raise ValueError(f"kv_transfer_params: target={target!r} is not among the targets of the configuration")
        attention = fields.get("attention", options.attention)
        attention_of(attention)
        return cls(target, attention, asked_for)


def attention_of(value: str | dict) -> Attention | str:
    """As headstart.PrefillClient takes it."""
    if isinstance(value, dict):
        try:
            return Attention(**value)
        except TypeError as error:
            raise ValueError(f"attention: {error}") from None
    if value not in _PRESETS:
        raise ValueError(f"attention={value!r} is not one of {', '.join(_PRESETS)}")
    return value


def _strings(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"kv_connector_extra_config: {name}={value!r} is no list of strings")
    return tuple(value)
