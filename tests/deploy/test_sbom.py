"""deploy/image/make_sbom.py: the bill of materials of an image."""

import json
import pathlib
import subprocess
import sys

import pytest
from manifests import REPO

SCRIPT = REPO / "deploy/image/make_sbom.py"
DPKG_STATUS = pathlib.Path("/var/lib/dpkg/status")
STATUS = """\
Package: libgrpc++1.51
Status: install ok installed
Architecture: amd64
Source: grpc
Version: 1.51.1-3+b1
Description: high performance RPC
 Version: not this one

Package: zlib1g
Status: install ok installed
Architecture: amd64
Source: zlib (1:1.2.13.dfsg-1)
Version: 1:1.2.13.dfsg-1+b2

Package: old
Status: deinstall ok config-files
Architecture: all
Version: 1
"""


def run(status, *options):
    command = [sys.executable, SCRIPT, "--version", "0.1.0", "--distribution", "debian-12", *options]
    return subprocess.run(command, input=status, capture_output=True, text=True, check=False)


def sbom(status, *options):
    done = run(status, *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_names_what_is_installed_by_package_and_source():
    document = sbom(STATUS)
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.5")
    assert document["metadata"]["component"]["version"] == "0.1.0"
    assert [component["purl"] for component in document["components"]] == [
        "pkg:deb/debian/libgrpc%2B%2B1.51@1.51.1-3%2Bb1?arch=amd64&distro=debian-12&upstream=grpc%401.51.1-3%2Bb1",
        "pkg:deb/debian/zlib1g@1%3A1.2.13.dfsg-1%2Bb2?arch=amd64&distro=debian-12&upstream=zlib%401%3A1.2.13.dfsg-1",
    ]


def test_every_reference_is_a_component_and_unique():
    document = sbom(STATUS)
    refs = [component["bom-ref"] for component in document["components"]]
    assert len(set(refs)) == len(refs)
    assert document["dependencies"] == [{"ref": document["metadata"]["component"]["bom-ref"], "dependsOn": refs}]


def test_the_same_image_gives_the_same_bytes():
    assert run(STATUS).stdout == run(STATUS).stdout
    assert sbom(STATUS)["serialNumber"] != sbom(STATUS.replace("1.51.1-3+b1", "1.51.1-4"))["serialNumber"]


def test_packages_of_python_come_from_pip_freeze(tmp_path):
    freeze = tmp_path / "freeze"
    freeze.write_text("# a comment\nNumPy==2.3.5\ngoogle_crc32c==1.9.0  # why\n")
    purls = [component["purl"] for component in sbom(STATUS, "--pip", freeze)["components"]]
    assert purls[-2:] == ["pkg:pypi/google-crc32c@1.9.0", "pkg:pypi/numpy@2.3.5"]


@pytest.mark.parametrize("status", ["", STATUS.replace("ok installed", "ok unpacked")])
def test_an_image_without_packages_is_an_error(status):
    done = run(status)
    assert done.returncode != 0 and "no installed package" in done.stderr and not done.stdout


@pytest.mark.skipif(not DPKG_STATUS.exists(), reason="no dpkg here")
def test_has_what_dpkg_has_on_this_machine():
    listed = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package} ${Version}\n"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    installed = sorted(line.split()[1:] for line in listed.splitlines() if line.startswith("installed "))
    components = sbom(DPKG_STATUS.read_text())["components"]
    assert sorted([component["name"], component["version"]] for component in components) == installed
