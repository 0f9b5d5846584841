"""ProxyAttn's block selection (arXiv 2509.24745), written in NumPy from its specification.

It shares no code with the C++ of this repository and follows the words of the paper and of
kernels/cpu/reference_selection.h: float64 throughout, arrays instead of loops over tokens. Only the
pooled queries and keys are rounded, as every implementation must.
"""

import dataclasses
import math

import numpy as np

BLOCK = 128  # tokens
OWN, SHARED, ROW = range(3)


@dataclasses.dataclass
class Options:
    num_proxies: int = 1
    stride: int = 4
    budget: int = SHARED
    gamma: float = 0.95
    floor_tokens: int = 2048
    sink_blocks: int = 1
    local_blocks: int = 1
    dense_tail_blocks: int = 2
    dense_below_tokens: int = 4096
    dense_above_density: float = 0.6
    forced_density: float = 0.0
    dense_layers: tuple = ()


def num_blocks(num_tokens):
    return -(-num_tokens // BLOCK)


def round_to_bf16(x):
    """Nearest bfloat16 of a float32 array, ties to even; the result is float32."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32)


def sample_and_pool(x, groups, stride, bf16):
    """x: float32 [tokens, heads, d] -> float64 [samples, groups, d].

    Every stride-th token; mean over the heads of a group: a float32 sum in rising order, one division,
    rounded to the storage type.
    """
    samples = x[::stride]
    tokens, heads, d = samples.shape
    members = samples.reshape(tokens, groups, heads // groups, d)
    total = members[:, :, 0].astype(np.float32)
    for i in range(1, heads // groups):
        total = total + members[:, :, i]
    mean = total / np.float32(heads // groups)
    return (round_to_bf16(mean) if bf16 else mean).astype(np.float64)


def causal_log_softmax(q, k, first):
    """Row i of q stands at position `first + i` of k. Log-probabilities, -inf where not visible."""
    logits = q @ k.T / math.sqrt(q.shape[1])
    visible = np.arange(k.shape[0])[None, :] <= first + np.arange(q.shape[0])[:, None]
    logits = np.where(visible, logits, -np.inf)
    top = logits.max(axis=1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))


def by_block(values, per_block, reduce):
    """Reduces the last axis in runs of `per_block`; the last run may be short."""
    starts = np.arange(0, values.shape[-1], per_block)
    return reduce.reduceat(values, starts, axis=-1)


@dataclasses.dataclass
class Scores:
    """Step 1. Row m of proxy p: log_max[p][m], mass[p][m], each [m + 1]; m counts from first_row."""

    log_max: list
    mass: list
    logit_error: float  # of a float32 computation of a logit
    first_row: int


def score_blocks(q, k, first_position, options, bf16):
    heads, kv_heads = q.shape[1], k.shape[1]
    g, s = options.num_proxies, options.stride
    key_groups = min(g, kv_heads)
    q_bar = sample_and_pool(q, g, s, bf16)
    k_bar = sample_and_pool(k, key_groups, s, bf16)
    per_block = BLOCK // s
    first_sample = first_position // s
    first_row = first_position // BLOCK
    rows = num_blocks(k.shape[0]) - first_row
    log_max, mass = [], []
    for p in range(g):
        log_p = causal_log_softmax(q_bar[:, p], k_bar[:, p * key_groups // g], first_sample)
        row_max = by_block(log_p, per_block, np.maximum)  # [samples, key blocks]
        row_mass = by_block(np.exp(log_p), per_block, np.add)
        log_max.append([])
        mass.append([])
        for i in range(rows):
            of_row = slice(i * per_block, (i + 1) * per_block)
            m = first_row + i
            log_max[p].append(row_max[of_row, : m + 1].max(axis=0))
            total = row_mass[of_row, : m + 1].sum(axis=0)
            mass[p].append(total / total.sum())
    return Scores(log_max, mass, logit_error(q_bar, k_bar), first_row)


def logit_error(q, k):
    """Bound of the error of a float32 dot product of d terms, scaled by 1 / sqrt(d), in any order.

    d * 2^-24 of the sum of absolute terms is the textbook bound; that sum is at most |q| |k|. Two more
    roundings: of the scaling and of the reduction that follows.
    """
    d = q.shape[-1]
    norms = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    return (d + 2) * 2.0**-24 * norms / math.sqrt(d)


@dataclasses.dataclass
class LastBlockMass:
    """Step 2: mass[h] is [key blocks] and sums to 1."""

    mass: np.ndarray
    logit_error: float


def last_block_mass(q, k, first_position):
    heads, kv_heads = q.shape[1], k.shape[1]
    end = k.shape[0]
    start = (num_blocks(end) - 1) * BLOCK
    last_q = q[start - first_position :].astype(np.float64)
    keys = k.astype(np.float64)
    mass = []
    for h in range(heads):
        log_p = causal_log_softmax(last_q[:, h], keys[:, h * kv_heads // heads], start)
        total = by_block(np.exp(log_p), BLOCK, np.add).sum(axis=0)
        mass.append(total / total.sum())
    return LastBlockMass(np.array(mass), logit_error(last_q, keys))


def forced_blocks(m, options):
    """Always first in row m: the diagonal, the sink, local ones nearest first."""
    wanted = [m]
    if options.sink_blocks:
        wanted.append(0)
    wanted += [m - i for i in range(1, options.local_blocks + 1) if m - i >= 0]
    return list(dict.fromkeys(wanted))


def rank(m, scores, options):
    """All causal blocks of row m: forced ones, then by falling score, ties to the lower index."""
    forced = forced_blocks(m, options)
    rest = np.setdiff1d(np.arange(m + 1), forced)
    return np.array(forced + list(rest[np.argsort(-scores[rest], kind="stable")]), dtype=np.int64)


def count_to_reach(mass_in_order, gamma):
    """Least number of leading entries whose sum reaches gamma; all of them if none does, or gamma = 1."""
    total = len(mass_in_order)
    if gamma >= 1:
        return total
    reached = np.flatnonzero(np.cumsum(mass_in_order) >= gamma)
    return int(reached[0]) + 1 if len(reached) else total


def wanted_blocks(mass, last_ranking, options, gamma):
    """Step 2 for one head: the number of blocks that reaches gamma."""
    order = np.argsort(-mass, kind="stable") if options.budget == OWN else last_ranking
    return count_to_reach(mass[order], gamma)


def floor_blocks(options):
    return num_blocks(options.floor_tokens)


def budget_of_ratio(ratio, blocks, options):
    """K of a head from its (float32) budget ratio."""
    return max(math.ceil(float(ratio) * blocks - 2.0**-10), floor_blocks(options))


def forced_budget(first_row, rows, density):
    """Least K for which the rows keep `density` of their causal blocks."""
    causal = np.arange(first_row, first_row + rows) + 1
    for k in range(1, causal[-1] + 1):
        if np.minimum(causal, k).sum() >= density * causal.sum():
            return k
    return int(causal[-1])


def dense_by_rule(num_tokens, layer, options):
    return num_tokens <= options.dense_below_tokens or layer in options.dense_layers


def apply_dense_tail(counts, first_row, ends_prompt, options):
    """counts: [heads, rows], changed in place."""
    rows = counts.shape[1]
    tail = min(options.dense_tail_blocks, rows) if ends_prompt else 0
    for i in range(rows - tail, rows):
        counts[:, i] = first_row + i + 1


def passes_density(counts, first_row, options):
    """Whether more than dense_above_density of the chunk's causal blocks are kept."""
    heads, rows = counts.shape
    causal = heads * (np.arange(first_row, first_row + rows) + 1).sum()
    return counts.sum() > float(np.float32(options.dense_above_density)) * causal
