"""The pods of the overlays, started as they are: command line, config, mounts, user, read-only root."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from live import headstart
from manifests import OVERLAYS, container_of, environment_of, pod_of, render, server_config, server_config_text
from tiny_model import write_tiny_model

HERE = pathlib.Path(__file__).resolve().parent
# As root, or as root of a user namespace where the machine lets everybody make one.
UNSHARE = ["unshare", "--mount", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]


def can_unshare():
    return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not can_unshare(), reason="this machine does not allow namespaces: run as root")


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def make_certificates(folder):
    """A CA, and one certificate for localhost that serves both sides, as cert-manager would write them: it knows names, and not
    the address that the pod will have."""
    folder.mkdir()
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj",
            "/CN=test CA", "-keyout", folder / "ca.key", "-out", folder / "ca.crt")
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=headstart",
            "-keyout", folder / "tls.key", "-out", folder / "request.pem")
    (folder / "names").write_text("subjectAltName=DNS:localhost,DNS:headstart-headless\n")
    openssl("x509", "-req", "-in", folder / "request.pem", "-CA", folder / "ca.crt", "-CAkey", folder / "ca.key",
            "-CAcreateserial", "-days", "1", "-extfile", folder / "names", "-out", folder / "tls.crt")
    for path in folder.iterdir():
        path.chmod(0o644)  # the Secret volume's group does this in a pod
    return folder


def mounted(objects, folder):
    """Container path -> path here, for every volume of the pod, and for the model that the demo image carries."""
    config = server_config(objects)
    (folder / "config").mkdir()
    # A GPU is the one thing that this machine can't have.
    text = server_config_text(objects).replace('device = "cuda"', 'device = "cpu"')
    (folder / "config/server.toml").write_text(text)
    model = pathlib.PurePosixPath(config["model"])
    for path in write_tiny_model(folder / "models" / model.name, max_positions=131072).iterdir():
        path.chmod(0o644)
    sources = {"config": folder / "config", "model": folder / "models"}
    if "tls-cert" in config:
        sources["tls"] = make_certificates(folder / "tls")
    paths = {mount["mountPath"]: str(sources[mount["name"]]) for mount in container_of(objects)["volumeMounts"]}
    return {str(model.parent): str(folder / "models"), **paths}


def probe_specs(container):
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    specs = {}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        http = container[name]["httpGet"]
        specs[name] = {"port": ports[http["port"]], "path": http["path"], "timeout": container[name]["timeoutSeconds"]}
    return specs


def describe(objects, folder):
    container, spec = container_of(objects), pod_of(objects)["spec"]
    (folder / "root").mkdir()
    client = [sys.executable, HERE / "pod_client.py", f"localhost:{container['ports'][0]['containerPort']}"]
    mounts = mounted(objects, folder)
    if (folder / "tls").exists():
        client.append(folder / "tls")
    return {
        "root": str(folder / "root"), "mounts": mounts,
        # Where the Dockerfile puts it.
        "program": {"source": str(headstart()), "target": "/usr/local/bin/headstart"},
        "command": container["command"] + container["args"],
        "env": environment_of(container, pod_ip="127.0.0.1"),
        "security": {"user": spec["securityContext"]["runAsUser"], "group": spec["securityContext"]["runAsGroup"]},
        "probes": probe_specs(container), "client": [str(part) for part in client],
        "grace_s": spec["terminationGracePeriodSeconds"] - container["lifecycle"]["preStop"]["sleep"]["seconds"],
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pod_starts_passes_its_probes_serves_and_drains(overlay, tmp_path):
    tmp_path.chmod(0o755)
    description = tmp_path / "pod.json"
    description.write_text(json.dumps(describe(render(overlay), tmp_path)))
    done = subprocess.run([*UNSHARE, sys.executable, HERE / "pod_sandbox.py", description], capture_output=True,
                          text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(report)
    assert set(report["probes"].values()) == {200}
    assert report["process"] == {"uid": 65532, "capabilities": 0, "no_new_privs": True}
    assert report["client"].strip() == "100 2", done.stderr
    assert report["exit_code"] == 0
