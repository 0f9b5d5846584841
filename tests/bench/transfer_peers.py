#!/usr/bin/env python3
"""Moves host memory from one process to another over loopback with other people's transfer engines, and prints GB/s.

Plain TCP is the limit; NIXL (UCX over TCP) and Mooncake's transfer engine are what a KV cache is shipped with
elsewhere. "read": the receiver fetches; "write": the sender pushes. Each row has its own pair of processes. What
arrived is checked outside the measured time, and the counter of the loopback device shows that the bytes went over
TCP. A peer that is not installed or fails stays in the table, with the reason.

Needs numpy; nixl-cu13 and mooncake-transfer-engine-cuda13 for their rows.

Usage: transfer_peers.py [--bytes N] [--block-bytes N] [--connections 1,2,4,8] [--peers tcp,nixl-read] [--json FILE]
"""

import argparse
import contextlib
import json
import mmap
import multiprocessing
import os
import pathlib
import statistics
import sys
import time

import numpy as np
from transfer_peers_sides import PEERS, Job

PAGE_BYTES = 4096
ANSWER_SECONDS = 300
CLOSE_SECONDS = 20


class PeerError(Exception):
    """A peer that can't be measured; says why."""


# ---- in the two processes


def page_ends(memory):
    """The first and the last word of every page, as two arrays that can be written."""
    pages = np.frombuffer(memory, np.uint64).reshape(-1, PAGE_BYTES // 8)
    return pages[:, 0], pages[:, -1]


def stamp(memory):
    """Gives every page a number of its own, at both ends."""
    for i, words in enumerate(page_ends(memory)):
        words[:] = np.arange(1, len(words) + 1, dtype=np.uint64) * np.uint64(2) + np.uint64(i)


def clear(memory):
    for words in page_ends(memory):
        words[:] = 0


def wrong_pages(memory):
    """How many pages don't have their number at both ends."""
    wrong = np.zeros(len(memory) // PAGE_BYTES, bool)
    for i, words in enumerate(page_ends(memory)):
        wrong |= words != np.arange(1, len(words) + 1, dtype=np.uint64) * np.uint64(2) + np.uint64(i)
    return int(wrong.sum())


def wait_until_right(memory):
    """wrong_pages, once it is 0 or a second has passed: a writer may be done before its last bytes have been read."""
    end = time.monotonic() + 1
    while wrong_pages(memory) and time.monotonic() < end:
        time.sleep(0.01)
    return wrong_pages(memory)


def run_side(pipe, peer, index, job):
    """One process: answers ("ok", value) or ("error", text) to each (command, argument) until told to stop."""
    os.dup2(2, 1)  # engines print to both; standard output is the table's
    memory = mmap.mmap(-1, job.bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    if index == 0:
        stamp(memory)
    side = None

    def open_side(_):
        nonlocal side
        side = PEERS[peer][index](job, memory)
        return side.address()

    commands = {
        "open": open_side,
        "connect": lambda other: side.connect(other),
        "clear": lambda _: clear(memory),
        "cpu": lambda _: time.process_time(),
        "move": lambda _: side.move(),
        "check": lambda _: wait_until_right(memory),
        "close": lambda _: side.close(),
    }
    while True:
        command, argument = pipe.recv()
        try:
            pipe.send(("ok", commands[command](argument)))
        except Exception as error:
            pipe.send(("error", f"{command}: {type(error).__name__}: {error}"))
        if command == "close":
            # Engines' threads may still run; nothing of them is needed.
            os._exit(0)


# ---- in the parent


class SideProcess:
    """Asks one of the two processes. PeerError: it said no, died or does not answer."""

    def __init__(self, peer, index, job):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=run_side, args=(theirs, peer, index, job), daemon=True)
        with environment(PEERS[peer][index].environment(job)):
            self.process.start()
        theirs.close()

    def send(self, command, argument=None):
        try:
            self.pipe.send((command, argument))
        except OSError as error:
            raise PeerError(f"{command}: the process has ended") from error

    def answer(self, seconds=ANSWER_SECONDS):
        try:
            if not self.pipe.poll(seconds):
                raise PeerError(f"no answer in {seconds} s")
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join(CLOSE_SECONDS)
            raise PeerError(f"the process ended with {self.process.exitcode}") from error
        if kind == "error":
            raise PeerError(value)
        return value

    def stop(self):
        with contextlib.suppress(PeerError):
            self.send("close")
            self.answer(CLOSE_SECONDS)
        self.process.join(CLOSE_SECONDS)
        self.process.kill()


@contextlib.contextmanager
def environment(variables):
    """Sets variables for the processes that start meanwhile."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def ask_all(sides, command, arguments=None):
    for side, argument in zip(sides, arguments or [None] * len(sides)):
        side.send(command, argument)
    return [side.answer() for side in sides]


def loopback_bytes():
    return int(pathlib.Path("/sys/class/net/lo/statistics/rx_bytes").read_text())


def move_once(sides, job):
    """One transfer, checked: seconds, CPU seconds of both, and bytes on the loopback device by byte moved."""
    ask_all(sides[1:], "clear")
    cpu_before = ask_all(sides, "cpu")
    wire_before = loopback_bytes()
    start = time.monotonic()
    ask_all(sides, "move")
    seconds = time.monotonic() - start
    cpu = [after - before for after, before in zip(ask_all(sides, "cpu"), cpu_before)]
    wire = (loopback_bytes() - wire_before) / job.bytes
    (wrong,) = ask_all(sides[1:], "check")
    if wrong:
        raise PeerError(f"{wrong} of {job.bytes // PAGE_BYTES} pages are wrong")
    if wire < 1:
        raise PeerError(f"only {wire:.2f} of the bytes went over the loopback device")
    return {"seconds": seconds, "cpu_source": cpu[0], "cpu_sink": cpu[1], "wire": wire}


def measure(peer, job, runs):
    """The median run of a pair of processes."""
    sides = []
    try:
        sides = [SideProcess(peer, index, job) for index in (0, 1)]
        addresses = ask_all(sides, "open")
        ask_all(sides, "connect", addresses[::-1])
        results = sorted((move_once(sides, job) for _ in range(runs)), key=lambda run: run["seconds"])
        median = results[(len(results) - 1) // 2]
        gigabytes = job.bytes / 1e9
        return {
            **median,
            "gb_per_s": gigabytes / median["seconds"],
            "gb_per_s_best": gigabytes / results[0]["seconds"],
        }
    finally:
        for side in sides:
            side.stop()


def print_row(row):
    if "error" in row:
        print(f"{row['peer']:15} {row['connections']:11} failed: {row['error']}", flush=True)
        return
    print(
        f"{row['peer']:15} {row['connections']:11} {row['gb_per_s']:6.2f} {row['gb_per_s_best']:6.2f} "
        f"{row['cpu_source']:11.2f} {row['cpu_sink']:9.2f} {row['wire']:6.2f}",
        flush=True,
    )


def numbers(text):
    return [int(number) for number in text.split(",")]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=17179869184, help="default: KV of 128K tokens of Llama-3.1-8B")
    parser.add_argument("--block-bytes", type=int, default=1 << 20)
    parser.add_argument("--connections", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS), help=",".join(PEERS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path, help="write the rows there too")
    options = parser.parse_args()
    if options.bytes <= 0 or options.bytes % PAGE_BYTES or options.block_bytes <= 0 or options.block_bytes % PAGE_BYTES:
        parser.error(f"--bytes and --block-bytes must be positive multiples of {PAGE_BYTES}")
    if options.runs < 1 or min(options.connections) < 1:
        parser.error("--runs and --connections must be at least 1")
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}")
    return options


def main():
    options = parse_arguments()
    multiprocessing.set_start_method("spawn")
    print(f"{options.bytes / 1e9:.2f} GB in blocks of {options.block_bytes >> 10} KiB, median of {options.runs} runs")
    print(f"{'peer':15} connections   GB/s   best  CPU source  CPU sink   wire")
    rows = []
    for peer in options.peers:
        for connections in options.connections:
            job = Job(options.bytes, options.block_bytes, connections)
            row = {"peer": peer, "connections": connections}
            try:
                row |= measure(peer, job, options.runs)
            except PeerError as error:
                row["error"] = str(error)
            rows.append(row)
            print_row(row)
    print("CPU: seconds of the process during the median run. wire: bytes on the loopback device by byte moved.")
    if options.json:
        report = {"bytes": options.bytes, "block_bytes": options.block_bytes, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1))
    return 0 if any("error" not in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
