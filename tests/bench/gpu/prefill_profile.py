"""Where each millisecond of a prefill goes: a table and a picture of what `prefill_bench --trace` wrote.

    python3 prefill_profile.py TRACE MODEL_CONFIG --tokens N --density D [--picture FILE]

MODEL_CONFIG is the model's config.json; D the executed share of the causal blocks that prefill_bench printed. Every part stands
beside its floor: matrix products, attention and scores at PEAK_TFLOPS (what cuBLAS reaches on the largest products on an H100),
the rest by the bytes that it must move at COPY_TBPS (a device-to-device copy there).
"""

import argparse
import json
import re

PEAK_TFLOPS = 790
COPY_TBPS = 3.0
# Part: what the names of its kernels contain.
PARTS = {
    "matrix products": r"nvjet|gemm|splitKreduce|cutlass",
    "attention": r"AttentionKernel",
    "selection": r"ProxyScore|ReduceScores|PoolKernel|PartialMass|QueryLogSum|BlockMass|HeadBudget|FixedBudget|RowMass|RowBudget"
    r"|ResolveKernel|SelectKernel|CountBlocks|CountFallback|AddTotals",
    "SwiGLU": r"SwiGlu",
    "RMSNorm": r"RmsNorm",
    "RoPE, KV to pages": r"RopeKvWrite",
    "KV to fp8": r"QuantizeKv",
    "other": r"Embedding|memset|copy",
}


def read_trace(path):
    with open(path) as file:
        return sorted((json.loads(line) for line in file), key=lambda event: event["start_ns"])


def part_of(name):
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "other")


def compute_stream(events):
    return next(event["stream"] for event in events if "AttentionKernel" in event["name"])


def floors_ms(config, tokens, density):
    """Part: least time. The last layer's attention and FFN run for one block only and are left out."""
    hidden, ffn, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or hidden // heads
    qkv = (heads + 2 * kv_heads) * dim
    rest = layers - 1
    products = 2 * tokens * (layers * hidden * qkv + rest * (heads * dim * hidden + 3 * hidden * ffn))
    attention = 4 * tokens * tokens / 2 * dim * heads * density * rest
    scores = 2 * (tokens / 16) ** 2 / 2 * dim * heads * rest if density < 1 else 0
    flops = {"matrix products": products, "attention": attention, "selection": scores}
    moved = {
        "SwiGLU": rest * tokens * 3 * ffn * 2,
        "RMSNorm": (layers + rest) * tokens * 2 * hidden * 2,
        "RoPE, KV to pages": layers * tokens * 2 * qkv * 2,
    }
    return {part: count / PEAK_TFLOPS / 1e9 for part, count in flops.items()} | {
        part: count / COPY_TBPS / 1e9 for part, count in moved.items()
    }


def summarize(events, floors):
    """Rows (part, ms, floor ms or None), longest first, and the whole time in ms."""
    main = [event for event in events if event["stream"] == compute_stream(events)]
    spent = dict.fromkeys(PARTS, 0.0)
    for event in main:
        spent[part_of(event["name"])] += (event["end_ns"] - event["start_ns"]) / 1e6
    whole = (max(event["end_ns"] for event in events) - events[0]["start_ns"]) / 1e6
    rows = sorted(((part, ms, floors.get(part)) for part, ms in spent.items()), key=lambda row: -row[1])
    rows.append(("gaps: nothing runs", whole - sum(spent.values()), 0.0))
    return rows, whole


def print_table(rows, whole):
    print("| part | ms | share | floor, ms | of the floor |\n|---|---|---|---|---|")
    for part, ms, floor in rows:
        bound = f"{floor:.0f} | {ms / floor:.2f}" if floor else " | "
        print(f"| {part} | {ms:.1f} | {100 * ms / whole:.1f} % | {bound} |")
    print(f"| whole | {whole:.1f} | | | |")


def draw(events, rows, whole, picture):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {part: plt.get_cmap("tab10")(i) for i, part in enumerate(PARTS)}
    main, begin = compute_stream(events), events[0]["start_ns"]
    figure, (bars, line) = plt.subplots(2, 1, figsize=(11, 5.5), height_ratios=(3, 2), layout="constrained")
    shown = [row for row in rows if row[1] >= 0.5][::-1]
    bars.barh([part for part, *_ in shown], [ms for _, ms, _ in shown], color=[colors.get(part, "0.6") for part, *_ in shown])
    for i, (_, ms, floor) in enumerate(shown):
        bars.text(ms + whole * 0.004, i, f"{ms:.0f} ms", va="center", fontsize=8)
        if floor:
            bars.plot([floor, floor], [i - 0.4, i + 0.4], color="black", linewidth=1.5)
    bars.set_xlim(right=1.08 * max(ms for _, ms, _ in shown))
    bars.set_xlabel("ms in all; black: floor")
    # One layer in the middle, kernel by kernel.
    attention = [event for event in events if "AttentionKernel" in event["name"]]
    middle = (len(attention) - 1) // 2
    first, last = attention[middle]["end_ns"], attention[middle + 1]["end_ns"]
    for event in events:
        if first <= event["end_ns"] <= last:
            row = 1 if event["stream"] == main else 0
            color = colors[part_of(event["name"])] if row else "0.75"
            line.barh(row, (event["end_ns"] - event["start_ns"]) / 1e6, left=(event["start_ns"] - begin) / 1e6, color=color)
    line.set_yticks([0, 1], ["KV to the host", "compute"])
    line.set_xlabel("ms since the start: one layer of one chunk")
    figure.savefig(picture, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("config")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--density", type=float, required=True)
    parser.add_argument("--picture")
    args = parser.parse_args()
    with open(args.config) as file:
        floors = floors_ms(json.load(file), args.tokens, args.density)
    events = read_trace(args.trace)
    rows, whole = summarize(events, floors)
    print_table(rows, whole)
    if args.picture:
        draw(events, rows, whole, args.picture)


if __name__ == "__main__":
    main()
