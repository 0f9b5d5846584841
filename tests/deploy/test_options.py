"""Options that manifests and texts name exist in the program that was built."""

import re
import subprocess

import pytest

from live import headstart
from manifests import KUBERNETES, OVERLAYS, REPO, render, server_config_text


def serve(*arguments):
    return subprocess.run([headstart(), "serve", *arguments], capture_output=True, text=True, check=False)


def accepted(text, folder):
    path = folder / "server.toml"
    path.write_text(text)
    return serve(f"--config={path}", "--print-config")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_server_takes_the_config_of_an_overlay(overlay, tmp_path):
    done = accepted(server_config_text(render(overlay)), tmp_path)
    assert done.returncode == 0, done.stderr


def test_server_takes_the_config_of_the_base(tmp_path):
    done = accepted((KUBERNETES / "base/server.toml").read_text(), tmp_path)
    assert done.returncode == 0, done.stderr


def test_server_refuses_an_unknown_key(tmp_path):
    """The checks above can fail."""
    done = accepted('model = "/m"\ndrain-time = "60s"\n', tmp_path)
    assert done.returncode == 2 and "drain-time" in done.stderr


@pytest.mark.parametrize("text", ["RUNBOOK.md", "README.md"])
def test_options_in_texts_exist(text):
    known = set(re.findall(r"^  --([a-z-]+)", serve("--help").stdout, flags=re.MULTILINE))
    other = {"autoscaling-hpa", "cpu-demo", "headstart-model", "headstart-tls", "nvidia-operator", "port-forward", "cert-manager", "model-claim",
             "model-image", "nvidia-smi", "headstart-headless"}
    named = set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", (REPO / "deploy" / text).read_text()))
    assert "drain-timeout" in named
    assert named - other <= known
