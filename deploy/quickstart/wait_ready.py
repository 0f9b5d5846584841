#!/usr/bin/env python3
"""Waits until a server is ready and prints "GRPC_TARGET ADMIN_URL". usage: wait_ready.py PORT_FILE PID

Fails when the process ends first, or after ten minutes.
"""
import json
import pathlib
import sys
import time
import urllib.error
import urllib.request

TIMEOUT_S = 600


def is_alive(pid):
    """A process that has ended but was not waited for counts as ended."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_ready(admin_url):
    try:
        return urllib.request.urlopen(f"{admin_url}/readyz", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def main():
    port_file, pid = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end and is_alive(pid):
        if port_file.exists():
            ports = json.loads(port_file.read_text())
            admin_url = f"http://127.0.0.1:{ports['admin_port']}"
            if is_ready(admin_url):
                print(f"127.0.0.1:{ports['port']} {admin_url}")
                return
        time.sleep(0.05)
    sys.exit("the server ended" if time.monotonic() < end else f"not ready after {TIMEOUT_S} s")


if __name__ == "__main__":
    main()
