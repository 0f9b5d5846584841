#!/usr/bin/env python3
"""Holds a C++ block selection to the NumPy specification, on random cases.

Usage: proxy_attn_spec_test.py --dump PATH_TO_proxy_attn_dump --implementation NAME --dtype bf16|f32

Every ranking and every count must be the specification's, but where the specification itself lies
within rounding of a tie: two neighbours in a ranking whose scores differ by less than `score_margin`,
or a budget whose mass comes within `mass_margin` of gamma. Both margins are bounds of the error of a
float32 computation (float64 for "Reference"), given with the cases, and of what the implementation
adds to it (PRECISION). How many rows needed them is printed, and more than a given share is a
failure. Exit code 77: numpy, or the implementation, is not here.
"""

import argparse
import dataclasses
import itertools
import struct
import subprocess
import sys
import tempfile

try:
    import numpy as np
except ImportError:
    print(f"skipped: {sys.executable} has no numpy; give one that has with -DHEADSTART_TEST_PYTHON")
    sys.exit(77)

import proxy_attn_spec as spec

SKIPPED = 77


@dataclasses.dataclass
class Precision:
    """What an implementation's arithmetic adds to the error of float32, and how it shows."""

    score: float = 0.0  # of the difference of two scores, natural-log units
    mass: float = 0.0
    tied_share: float = 0.01  # at most so many rows may need a margin
    head_dims: tuple = ()  # that it computes; empty: all of the cases'


# CUDA keeps the largest logit of a sampled query and a block as fp16 and takes some exponentials from a polynomial.
PRECISION = {"Cuda": Precision(score=6e-3, mass=2e-4, tied_share=0.1, head_dims=(64, 128))}


@dataclasses.dataclass
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    bf16: bool
    chunk_ends: list
    ends_prompt: bool
    layer: int
    options: spec.Options
    q: np.ndarray  # float32 [tokens, heads, d]
    k: np.ndarray

    def __str__(self):
        return (f"{self.heads}/{self.kv_heads} heads, d={self.head_dim}, chunks={self.chunk_ends}, "
                f"ends_prompt={self.ends_prompt}, layer={self.layer}, {self.options}")


# ---- exchange with proxy_attn_dump


def write_case(out, case):
    o = case.options

    def ints(*values):
        out.write(struct.pack(f"<{len(values)}i", *values))

    ints(case.heads, case.kv_heads, case.head_dim, int(case.bf16))
    ints(len(case.chunk_ends), *case.chunk_ends)
    ints(int(case.ends_prompt), case.layer, o.num_proxies, o.stride, o.budget, o.floor_tokens)
    ints(o.sink_blocks, o.local_blocks, o.dense_tail_blocks, o.dense_below_tokens)
    ints(len(o.dense_layers), *o.dense_layers)
    out.write(struct.pack("<3f", o.gamma, o.dense_above_density, o.forced_density))
    out.write(case.q.astype("<f4").tobytes())
    out.write(case.k.astype("<f4").tobytes())


@dataclasses.dataclass
class Result:
    """What the C++ kept of one chunk."""

    first_row: int
    rows: int
    dense_fallback: bool
    ranking: list  # [proxy][row] -> [m + 1]
    counts: np.ndarray  # [heads, rows]
    budget_ratio: np.ndarray  # float32 [heads]


def read_array(stream, dtype):
    (count,) = struct.unpack("<i", stream.read(4))
    return np.frombuffer(stream.read(4 * count), dtype=dtype)


def read_result(stream):
    first_row, rows, heads, proxies, fallback = (int(x) for x in read_array(stream, "<i4"))
    flat = read_array(stream, "<i4")
    counts = read_array(stream, "<i4").reshape(heads, rows)
    ratio = read_array(stream, "<f4")
    lengths = np.tile(np.arange(first_row, first_row + rows) + 1, proxies)
    assert len(flat) == lengths.sum(), f"{len(flat)} ranked blocks, expected {lengths.sum()}"
    pieces = np.split(flat, np.cumsum(lengths)[:-1])
    ranking = [pieces[p * rows : (p + 1) * rows] for p in range(proxies)]
    return Result(first_row, rows, bool(fallback), ranking, counts, ratio)


# ---- cases


def structured(rng, tokens, heads, kv_heads, d, bf16):
    """Queries and keys with topics: heads attend to some blocks much more than to others."""
    num_topics = 6
    topics = rng.standard_normal((num_topics, kv_heads, d))
    segment = rng.integers(40, 400)
    topic_of = rng.integers(0, num_topics, -(-tokens // segment)).repeat(segment)[:tokens]
    k = 0.7 * topics[topic_of] + rng.standard_normal((tokens, kv_heads, d))
    asked = rng.integers(0, num_topics, -(-tokens // 64)).repeat(64)[:tokens]
    sharpness = rng.uniform(0.1, 2.0, (1, heads, 1))
    q = sharpness * np.repeat(topics[asked], heads // kv_heads, axis=1)
    q = q + rng.standard_normal((tokens, heads, d))
    round_ = spec.round_to_bf16 if bf16 else lambda x: x
    return round_(q.astype(np.float32)), round_(k.astype(np.float32))


def chunks(rng, tokens):
    """One chunk, or several that start at multiples of a block."""
    if rng.random() < 0.5:
        return [tokens]
    borders = np.arange(spec.BLOCK, tokens, spec.BLOCK)
    picked = rng.choice(borders, size=min(len(borders), rng.integers(1, 4)), replace=False)
    return [int(x) for x in sorted(picked)] + [tokens]


def random_options(rng, g, stride, budget, tokens):
    return spec.Options(
        num_proxies=g,
        stride=stride,
        budget=budget,
        gamma=float(np.float32(rng.choice([0.3, 0.5, 0.7, 0.8, 0.95, 1.0]))),
        floor_tokens=int(rng.choice([0, 0, 100, 256, 2048])),
        sink_blocks=int(rng.integers(0, 2)),
        local_blocks=int(rng.integers(0, 4)),
        dense_tail_blocks=int(rng.integers(0, 4)),
        dense_below_tokens=int(rng.choice([0, 0, 0, tokens // 2])),
        dense_above_density=float(np.float32(rng.choice([0.6, 1.0, 1.0]))),
        forced_density=float(np.float32(rng.choice([0, 0, 0, 0, 0, 0.35]))),
        dense_layers=(3, 7),
    )


def random_cases(rng, bf16):
    """Every valid g of every head shape, with every stride; budget rules in turn."""
    rules = itertools.cycle([spec.OWN, spec.SHARED, spec.ROW])
    for heads, kv_heads, d in [(9, 3, 64), (12, 2, 128), (14, 2, 64), (16, 4, 128), (32, 8, 32), (6, 6, 48)]:
        for g in range(1, heads + 1):
            if heads % g or (kv_heads % g and g % kv_heads):
                continue
            for stride in (4, 8, 16):
                tokens = int(rng.integers(300, 1800))
                q, k = structured(rng, tokens, heads, kv_heads, d, bf16)
                options = random_options(rng, g, stride, next(rules), tokens)
                yield Case(heads, kv_heads, d, bf16, chunks(rng, tokens), bool(rng.integers(0, 2)),
                           int(rng.choice([0, 0, 0, 3])), options, q, k)


def edge_cases(rng, bf16):
    """Lengths around blocks and strides, for every rule; large logits; one token."""
    lengths = [1, 2, 127, 128, 129, 1024, 1025, 2047, 2048, 2049]
    for i, tokens in enumerate(lengths):
        for rule in (spec.OWN, spec.SHARED, spec.ROW):
            options = spec.Options(num_proxies=[1, 3, 9][i % 3], stride=[4, 8, 16][rule],
                                   budget=rule, gamma=0.75, floor_tokens=0, dense_below_tokens=0,
                                   dense_tail_blocks=0, dense_above_density=1.0)
            q, k = structured(rng, tokens, 9, 3, 64, bf16)
            yield Case(9, 3, 64, bf16, [tokens], True, 0, options, q, k)
    q, k = structured(rng, 1200, 9, 3, 64, bf16)
    q = q * np.float32(32)  # exact in bf16
    options = spec.Options(num_proxies=9, stride=4, floor_tokens=0, dense_below_tokens=0,
                           dense_above_density=1.0)
    yield Case(9, 3, 64, bf16, [640, 1200], False, 0, options, q, k)


def long_cases(rng, bf16):
    """The presets at a length that they are for, with a ragged end."""
    tokens = 8192 + 37
    q, k = structured(rng, tokens, 9, 3, 64, bf16)
    paper = spec.Options(num_proxies=1, stride=4, budget=spec.OWN, gamma=0.95, sink_blocks=0,
                         local_blocks=0, dense_tail_blocks=0)
    balanced = spec.Options(num_proxies=9, stride=16, budget=spec.SHARED, gamma=0.8)
    fast = spec.Options(num_proxies=9, stride=16, budget=spec.SHARED, gamma=0.6, floor_tokens=1024)
    for options, ends in ((paper, [tokens]), (balanced, [4096, tokens]), (fast, [tokens])):
        options.gamma = float(np.float32(options.gamma))
        yield Case(9, 3, 64, bf16, ends, True, 0, options, q, k)


def tie_case(bf16):
    """Every block of a row scores exactly alike."""
    tokens = 1500
    q = np.ones((tokens, 9, 64), dtype=np.float32)
    k = np.full((tokens, 3, 64), 0.5, dtype=np.float32)
    options = spec.Options(num_proxies=3, stride=16, local_blocks=2, dense_below_tokens=0,
                           floor_tokens=0, forced_density=0.5, dense_above_density=1.0)
    return Case(9, 3, 64, bf16, [tokens], False, 0, options, q, k)


# ---- comparison


class Mismatch(Exception):
    pass


def require(condition, *message):
    if not condition:
        raise Mismatch(" ".join(str(part) for part in message))


@dataclasses.dataclass
class Tally:
    rows: int = 0  # (head or proxy, row) pairs compared
    tied: int = 0  # of them, those that are right only within a margin


def check_ranking(result, scores, options, score_margin, tally):
    for p, rows in enumerate(result.ranking):
        for i, got in enumerate(rows):
            m = result.first_row + i
            tally.rows += 1
            if scores is None:
                expected = spec.rank(m, np.zeros(m + 1), options)
            else:
                expected = spec.rank(m, scores.log_max[p][i], options)
            if np.array_equal(got, expected):
                continue
            tally.tied += 1
            where = f"ranking of proxy {p}, row {m}: {got.tolist()}, expected {expected.tolist()}:"
            require(np.array_equal(np.sort(got), np.arange(m + 1)), where, "no permutation")
            forced = len(spec.forced_blocks(m, options))
            require(np.array_equal(got[:forced], expected[:forced]), where, "forced blocks differ")
            require(scores is not None, where, "rows that are dense by rule have no ties")
            steps = np.diff(scores.log_max[p][i][got[forced:]])
            require(steps.max(initial=-np.inf) <= score_margin, where, "a score rises by",
                    steps.max(), "with a margin of", score_margin)


def wanted_range(mass, ranking, options, margin):
    """Least and greatest number of blocks that reach gamma within the margin."""
    if options.gamma >= 1:
        return len(mass), len(mass)
    return tuple(spec.wanted_blocks(mass, ranking, options, options.gamma + side * margin)
                 for side in (-1, 1))


def check_ratio(result, previous, last, options, mass_margin, tally):
    """The head budgets of the C++ are the specification's; returns K of each head."""
    blocks = result.first_row + result.rows
    heads = len(previous)
    budgets = []
    for h in range(heads):
        ranking = result.ranking[h * len(result.ranking) // heads][-1]
        low, high = wanted_range(last.mass[h], ranking, options, mass_margin)
        allowed = {max(previous[h], np.float32(np.float32(k) / np.float32(blocks)))
                   for k in range(low, high + 1)}
        tally.rows += 1
        tally.tied += low != high
        require(result.budget_ratio[h] in allowed, f"budget ratio of head {h}:",
                result.budget_ratio[h], "expected", allowed)
        budgets.append(spec.budget_of_ratio(result.budget_ratio[h], blocks, options))
    return budgets


def row_rule_counts(result, scores, options, mass_margin, heads, tally):
    """Counts of BudgetRule::kRow, at the lower and at the upper end of the margin."""
    ends = np.zeros((2, heads, result.rows), dtype=np.int64)
    for h in range(heads):
        p = h * len(result.ranking) // heads
        for i in range(result.rows):
            m = result.first_row + i
            for end, side in enumerate((-1, 1)):
                gamma = options.gamma if options.gamma >= 1 else options.gamma + side * mass_margin
                wanted = spec.count_to_reach(scores.mass[p][i][result.ranking[p][i]], gamma)
                ends[end, h, i] = min(m + 1, max(wanted, spec.floor_blocks(options)))
            tally.rows += 1
            tally.tied += ends[0, h, i] != ends[1, h, i]
    return ends


def check_counts(case, result, ends, ends_prompt):
    """ends: [2, heads, rows], the least and greatest counts before the dense rules."""
    causal = np.arange(result.first_row, result.first_row + result.rows) + 1
    for counts in ends:
        spec.apply_dense_tail(counts, result.first_row, ends_prompt, case.options)
    fallback = [spec.passes_density(counts, result.first_row, case.options) for counts in ends]
    require(result.dense_fallback in fallback, "dense_fallback:", result.dense_fallback)
    if result.dense_fallback:
        require((result.counts == causal).all(), "counts are not dense after the fallback")
        return
    wrong = (result.counts < ends[0]) | (result.counts > ends[1])
    require(not wrong.any(), "counts of (head, row)", np.argwhere(wrong)[:5].tolist(), "are",
            result.counts[wrong][:5], "expected", ends[0][wrong][:5], "to", ends[1][wrong][:5])


def check_chunk(case, begin, end, result, previous, exact, precision, tally):
    options, heads = case.options, case.heads
    first_row = begin // spec.BLOCK
    require(result.first_row == first_row and result.rows == spec.num_blocks(end) - first_row,
            "rows:", result.first_row, result.rows)
    causal = np.arange(first_row, first_row + result.rows) + 1
    if spec.dense_by_rule(end, case.layer, options):
        check_ranking(result, None, options, 0, tally)
        require((result.counts == causal).all(), "counts are not dense by rule")
        require(not result.dense_fallback, "dense by rule is no fallback")
        require((result.budget_ratio == previous).all(), "dense by rule changed the budget")
        return
    q, k = case.q[begin:end], case.k[:end]
    scores = spec.score_blocks(q, k, begin, options, case.bf16)
    # A score is a logit minus a log-sum of logits: each errs by logit_error, and two are compared.
    score_margin = 1e-9 if exact else 4 * scores.logit_error + 2.0**-20 + precision.score
    check_ranking(result, scores, options, score_margin, tally)
    ends_prompt = case.ends_prompt and end == case.chunk_ends[-1]
    if options.forced_density > 0:
        budgets = [spec.forced_budget(first_row, result.rows, options.forced_density)] * heads
        ends = np.array([[np.minimum(causal, k) for k in budgets]] * 2)
    elif options.budget == spec.ROW:
        # A probability errs by the exponential of what a score errs by.
        mass_margin = 1e-9 if exact else 2 * scores.logit_error + 2.0**-18 + precision.mass
        ends = row_rule_counts(result, scores, options, mass_margin, heads, tally)
    else:
        last = spec.last_block_mass(q, k, begin)
        mass_margin = 1e-9 if exact else 2 * last.logit_error + 2.0**-18 + precision.mass
        budgets = check_ratio(result, previous, last, options, mass_margin, tally)
        ends = np.array([[np.minimum(causal, k) for k in budgets]] * 2)
    if options.forced_density > 0 or options.budget == spec.ROW:
        require((result.budget_ratio == previous).all(), "this rule leaves the budget ratio alone")
    check_counts(case, result, ends, ends_prompt)


def check_case(case, stream, exact, precision, tally):
    previous = np.zeros(case.heads, dtype=np.float32)
    begin = 0
    for end in case.chunk_ends:
        result = read_result(stream)
        try:
            check_chunk(case, begin, end, result, previous, exact, precision, tally)
        except Mismatch as mismatch:
            raise Mismatch(f"{case}\n  chunk [{begin}, {end}): {mismatch}") from None
        previous = result.budget_ratio
        begin = end


def check_exact_ties(case, stream):
    """Blocks that score alike are ranked by index, without any margin."""
    result = read_result(stream)
    for p, rows in enumerate(result.ranking):
        for m, got in enumerate(rows):
            expected = spec.rank(m, np.zeros(m + 1), case.options)
            require(np.array_equal(got, expected), f"ties of proxy {p}, row {m}: {got.tolist()},",
                    f"expected {expected.tolist()}")


def run_dump(args, cases):
    """The results of all cases as a readable stream, or None where the implementation is missing."""
    with tempfile.TemporaryFile() as file:
        for case in cases:
            write_case(file, case)
        file.seek(0)
        results = tempfile.TemporaryFile()
        done = subprocess.run([args.dump, args.implementation], stdin=file, stdout=results,
                              stderr=subprocess.PIPE, text=True)
    if done.returncode == SKIPPED:
        print("skipped:", done.stderr.strip())
        return None
    if done.returncode:
        sys.exit(f"{args.dump} failed: {done.stderr.strip()}")
    results.seek(0)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dump", required=True)
    parser.add_argument("--implementation", required=True)
    parser.add_argument("--dtype", choices=("bf16", "f32"), required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    bf16 = args.dtype == "bf16"
    rng = np.random.default_rng(args.seed)
    precision = PRECISION.get(args.implementation, Precision())
    cases = [*random_cases(rng, bf16), *edge_cases(rng, bf16), *long_cases(rng, bf16)]
    if precision.head_dims:
        cases = [case for case in cases if case.head_dim in precision.head_dims]
    stream = run_dump(args, [tie_case(bf16), *cases])
    if stream is None:
        return SKIPPED
    tally = Tally()
    try:
        check_exact_ties(tie_case(bf16), stream)
        for case in cases:
            check_case(case, stream, args.implementation == "Reference", precision, tally)
    except Mismatch as mismatch:
        print("MISMATCH:", mismatch)
        return 1
    print(f"{len(cases)} cases, {tally.rows} rankings and counts, {tally.tied} within a margin of a tie")
    return int(tally.tied > precision.tied_share * tally.rows)


if __name__ == "__main__":
    sys.exit(main())
