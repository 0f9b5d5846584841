"""The name of a model by what it computes: the `model_hash` of manifests, from a Hugging Face folder.

`python -m headstart.model_hash DIR` prints it. The recipe is written down in proto/README.md; the server follows it, too. What it
can't run it refuses; here no more is checked than the recipe reads.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import math
import os
import pathlib
import struct
import sys
from collections.abc import Iterator

PART_BYTES = 1 << 20  # hashed by themselves
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_F32 = struct.Struct("<f")
_LENGTH = struct.Struct("<Q")


def model_hash(model_dir: str | os.PathLike[str]) -> str:
    """Lower-case hex SHA-256. ValueError: not the folder of a Llama or Qwen model in safetensors."""
    folder = pathlib.Path(model_dir)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = _tensors(folder, bool(config.get("tie_word_embeddings")))
    if tensors.get(HEAD) == tensors[EMBEDDING]:
        del tensors[HEAD]  # says nothing
    lines = [_config_lines(config), *(f"{name} {text}\n" for name, text in sorted(tensors.items()))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _tensors(folder: pathlib.Path, tied: bool) -> dict[str, str]:
    """By the names that Hugging Face's …ForCausalLM gives them: dtype, shape and digest."""
    found: dict[str, str] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for path in _weight_files(folder):
            for name, text in _read(path, pool):
                own = name if name.startswith("model.") or name == HEAD else f"model.{name}"
                if own in found:
                    raise ValueError(f"{path}: tensor {name} is there twice")
                found[own] = text
    if EMBEDDING not in found and tied and HEAD in found:
        found[EMBEDDING] = found.pop(HEAD)
    if EMBEDDING not in found:
        raise ValueError(f"{folder}: tensor {EMBEDDING} is missing")
    return found


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def _read(path: pathlib.Path, pool: concurrent.futures.Executor) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header = json.loads(file.read(length))
        start = _LENGTH.size + length
        descriptor = file.fileno()

        def digest(part: tuple[int, int]) -> bytes:
            begin, end = part
            data = os.pread(descriptor, end - begin, start + begin)
            if len(data) != end - begin:
                raise ValueError(f"{path}: ends at byte {start + begin + len(data)}")
            return hashlib.sha256(data).digest()

        for name, entry in header.items():
            if name == "__metadata__" or name.endswith("rotary_emb.inv_freq"):
                continue
            begin, end = entry["data_offsets"]
            parts = [(at, min(at + PART_BYTES, end)) for at in range(begin, end, PART_BYTES)]
            whole = hashlib.sha256(b"".join(pool.map(digest, parts))).hexdigest()
            shape = ",".join(map(str, entry["shape"]))
            yield name, f"{entry['dtype']} [{shape}] {whole}"


def _config_lines(config: dict) -> str:
    kind, heads = config["model_type"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or (128 if kind == "qwen3" else config["hidden_size"] // heads)
    eps = config.get("rms_norm_eps")
    (eps,) = _F32.unpack(_F32.pack(1e-6 if eps is None else eps))
    first = f"headstart.v1.model\n{kind} heads={heads} kv_heads={kv_heads} head_dim={head_dim} eps={eps:.9g}\n"
    return first + _rope_line(config)


def _rope_line(config: dict) -> str:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    line = f"rope {kind} theta={theta:.17g}"
    if kind == "default":
        return line + "\n"
    positions = config["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or positions
    factor = rope.get("factor") or positions / original
    line += f" factor={factor:.17g}"
    if kind == "llama3":
        line += f" original={original} low={rope['low_freq_factor']:.17g} high={rope['high_freq_factor']:.17g}"
    elif kind == "yarn":
        fast, slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
        truncate = 0 if rope.get("truncate") is False else 1
        line += f" original={original} fast={fast:.17g} slow={slow:.17g} truncate={truncate} scale={_yarn_scale(rope, factor):.9g}"
    elif kind != "linear":
        raise ValueError(f"rope_type {kind} is not supported (default, linear, llama3, yarn are)")
    return line + "\n"


def _yarn_scale(rope: dict, factor: float) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0

    given, mscale, all_dim = rope.get("attention_factor"), rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    if given is not None:
        return given
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m headstart.model_hash DIR")
    print(model_hash(sys.argv[1]))
