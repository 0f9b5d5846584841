"""Everything that a server meets, for a long time: whether memory, descriptors and threads stay, and all goes back.

    python tests/deploy/soak.py [--seconds 600] [--model DIR --text FILE] [--pace N] [-- FLAGS OF THE SERVER]

The load is that of load.py: prompts of all kinds, with prefixes in common, cancels, clients that stop reading, fetches that
break and go on, KV that nobody fetches. Prints a row every so often, and ends with 1 when something grew or did not go back.
The first fifth counts as warming up. Needs what tests/run.sh installs.
"""

import pathlib
import sys
import tempfile
import time

from drawing import load_arguments, load_of, model_of
from live import Server, get, parse_metrics, wait_for
from load import LIMITS

MOST_GROWTH = {"process_resident_memory_bytes": 1.1, "process_open_fds": 1.5, "process_threads": 1.2}


def metrics(server):
    """Sums over labels, by name."""
    sums = {}
    for name, _, value in parse_metrics(get(f"http://{server.admin}/metrics")[1]):
        sums[name] = sums.get(name, 0) + value
    return sums


def is_idle(server):
    now = metrics(server)
    return (now["headstart_tickets_acquired_total"] == now["headstart_tickets_released_total"]
            and now["headstart_kv_pool_blocks_acquired_total"] == now["headstart_kv_pool_blocks_released_total"]
            and now["headstart_kv_leases"] == 0 and now["headstart_kv_fetch_streams"] == 0)


def watch(server, seconds):
    """Rows of metrics over the time."""
    rows, start = [], time.monotonic()
    print("| s | memory, MB | descriptors | threads | prompts | leases | cached pages' evictions |\n|---|---|---|---|---|---|---|")
    while (passed := time.monotonic() - start) < seconds:
        now = metrics(server)
        rows.append((passed, now))
        print(f"| {passed:.0f} | {now['process_resident_memory_bytes'] / 1e6:.0f} | {now['process_open_fds']:.0f} "
              f"| {now['process_threads']:.0f} | {now['headstart_tickets_acquired_total']:.0f} | {now['headstart_kv_leases']:.0f} "
              f"| {now['headstart_kv_pool_evictions_total']:.0f} |", flush=True)
        time.sleep(min(30, seconds / 20))
    return rows


def grown(rows, seconds):
    """What got more between the first fifth and the last, with both values."""
    warm = [now for passed, now in rows if passed >= seconds / 5]
    early, late = warm[:len(warm) // 4 or 1], warm[-(len(warm) // 4 or 1):]
    found = []
    for name, most in MOST_GROWTH.items():
        before, after = (sum(now[name] for now in part) / len(part) for part in (early, late))
        if after > most * before:
            found.append(f"{name}: {before:.0f} -> {after:.0f}")
    return found


def main():
    parser = load_arguments(__doc__, seconds=600)
    parser.add_argument("flags", nargs="*", help="more flags of the server, behind --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = model_of(options, folder)
        with Server(model, folder, "server", *LIMITS, *options.flags) as server:
            load = load_of(options, server.target, model)
            rows = watch(server, options.seconds)
            load.stop()
            print("seen by the clients:", dict(load.codes))
            wait_for(lambda: is_idle(server), "everything went back", timeout=120)
            print("everything went back")
            problems = grown(rows, options.seconds)
            server.terminate()
            code = server.wait()
    if code != 0:
        problems.append(f"the server ended with {code}")
    print("\n".join(problems) or "nothing grew")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
