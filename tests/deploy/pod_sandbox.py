"""Runs the pod of an overlay on this machine, as near to a kubelet as namespaces get.

Started by test_pod.py inside fresh mount and network namespaces, as their root. Builds a root file system with the
program, the config and the model where the pod has them, makes it read-only, starts the pod's exact command line as its
user without capabilities, and does what a kubelet does: startup, readiness and liveness probes, then SIGTERM. Prints what
happened as JSON.

usage: pod_sandbox.py DESCRIPTION.json
"""

import ctypes
import fcntl
import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
libc = ctypes.CDLL(None, use_errno=True)


def mount(source, target, kind=None, flags=0):
    encode = lambda text: None if text is None else str(text).encode()
    if libc.mount(encode(source), encode(target), encode(kind), flags, None) != 0:
        raise OSError(ctypes.get_errno(), f"mount {source} on {target}")


def bind(source, target, read_only=True):
    target = pathlib.Path(target)
    if pathlib.Path(source).is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount(source, target, None, MS_BIND | MS_REC)
    if read_only:
        mount(None, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY)


def build_root(root, description):
    """What the image has, from this machine, and what the pod mounts."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs")
    for name in ("usr", "etc/ssl", "etc/ld.so.cache"):
        bind(f"/{name}", root / name)
    for name in ("lib", "lib64", "bin"):
        (root / name).symlink_to(f"usr/{name}")
    for name in ("dev/null", "dev/urandom", "dev/zero"):
        bind(f"/{name}", root / name, read_only=False)
    # /proc and /sys of the machine: a new PID namespace would need a second process to hold it.
    bind("/proc", root / "proc", read_only=False)
    bind("/sys", root / "sys", read_only=False)
    mount("tmpfs", root / "usr/local", "tmpfs")
    bind(description["program"]["source"], root / description["program"]["target"].lstrip("/"))
    for target, source in description["mounts"].items():
        bind(source, root / target.lstrip("/"))
    mount(None, root, None, MS_BIND | MS_REMOUNT | MS_RDONLY)


def bring_up_loopback():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14s", b"lo", 0x1 | 0x40, b"")  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(control, 0x8914, request)  # SIOCSIFFLAGS


def start(root, description):
    security = description["security"]
    command = ["setpriv", f"--reuid={security['user']}", f"--regid={security['group']}", "--clear-groups",
               "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--", *description["command"]]
    environment = {"PATH": "/usr/bin:/bin", **description["env"]}
    return subprocess.Popen(command, env=environment, preexec_fn=lambda: (os.chroot(root), os.chdir("/")))


def probe(spec):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{spec['port']}{spec['path']}", timeout=spec["timeout"]) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def probe_until_ready(process, spec, limit_s=60):
    begin = time.monotonic()
    while probe(spec) != 200:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode} before it was ready")
        if time.monotonic() - begin > limit_s:
            raise SystemExit("the startup probe never passed")
        time.sleep(0.05)
    return time.monotonic() - begin


def user_of(process):
    """uid, capabilities and no_new_privs of the running server, as the kernel has them."""
    fields = dict(line.split(":\t", 1) for line in pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines()
                  if ":\t" in line)
    return {"uid": int(fields["Uid"].split()[0]), "capabilities": int(fields["CapEff"], 16),
            "no_new_privs": fields["NoNewPrivs"] == "1"}


def main():
    description = json.loads(pathlib.Path(sys.argv[1]).read_text())
    root = pathlib.Path(description["root"])
    build_root(root, description)
    bring_up_loopback()
    process = start(root, description)
    try:
        probes = description["probes"]
        report = {"ready_after_s": probe_until_ready(process, probes["startupProbe"])}
        report["probes"] = {name: probe(spec) for name, spec in probes.items()}
        report["process"] = user_of(process)
        report["client"] = subprocess.run(description["client"], capture_output=True, text=True, check=False).stdout
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        report["exit_code"] = process.wait(description["grace_s"])
        report["drained_after_s"] = time.monotonic() - begin
    finally:
        if process.poll() is None:
            process.kill()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
