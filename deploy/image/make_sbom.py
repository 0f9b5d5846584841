#!/usr/bin/env python3
"""Writes the bill of materials of an image as CycloneDX 1.5 JSON: Headstart, and every package that dpkg knows there.

Needs nothing in the image but dpkg's database, which comes on standard input or by --dpkg-status:

  docker run --rm --entrypoint cat headstart:cpu /var/lib/dpkg/status \\
    | deploy/image/make_sbom.py --version 0.1.0 --distribution debian-12 >headstart-cpu.cdx.json

The same input gives the same bytes. Packages of Python (a decode node's) come with --pip, in the form of `pip freeze`.
"""
import argparse
import json
import pathlib
import re
import sys
import urllib.parse
import uuid

SPEC_VERSION = "1.5"


def paragraphs(status):
    """The fields of each package of a dpkg database; continuation lines are left out."""
    for text in status.split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): *(.*)$", text, re.MULTILINE))
        if fields:
            yield fields


def source_of(fields):
    """Name and version of the source package: what security trackers speak of."""
    name, _, version = fields.get("Source", fields["Package"]).partition(" ")
    return name, version.strip("()") or fields["Version"]


def quote(text):
    return urllib.parse.quote(text, safe="")


def debian_component(fields, distribution):
    vendor = distribution.split("-")[0]
    source, source_version = source_of(fields)
    purl = (
        f"pkg:deb/{vendor}/{quote(fields['Package'])}@{quote(fields['Version'])}"
        f"?arch={fields['Architecture']}&distro={distribution}&upstream={quote(source)}%40{quote(source_version)}"
    )
    return {"type": "library", "bom-ref": purl, "name": fields["Package"], "version": fields["Version"], "purl": purl}


def python_component(line):
    name, _, version = line.partition("==")
    if not version:
        raise ValueError(f"{line!r} is not name==version")
    purl = f"pkg:pypi/{quote(name.lower().replace('_', '-'))}@{quote(version)}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def make_sbom(version, distribution, status, pip=""):
    """The document. `status`: text of /var/lib/dpkg/status. ValueError when no package is installed there."""
    components = [
        debian_component(fields, distribution)
        for fields in paragraphs(status)
        if fields.get("Status", "").endswith(" installed")
    ]
    if not components:
        raise ValueError("no installed package in the dpkg database")
    lines = (line.split("#")[0].strip() for line in pip.splitlines())
    components += [python_component(line) for line in lines if line]
    components.sort(key=lambda component: component["bom-ref"])
    refs = [component["bom-ref"] for component in components]
    root = f"pkg:generic/headstart@{quote(version)}"
    return {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, ' '.join([root, *refs]))}",
        "version": 1,
        "metadata": {
            "component": {"type": "application", "bom-ref": root, "name": "headstart", "version": version, "purl": root}
        },
        "components": components,
        "dependencies": [{"ref": root, "dependsOn": refs}],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", required=True, help="of Headstart")
    parser.add_argument("--distribution", required=True, help="debian-12 or ubuntu-24.04")
    parser.add_argument("--dpkg-status", type=pathlib.Path, help="the image's /var/lib/dpkg/status; else standard input")
    parser.add_argument("--pip", type=pathlib.Path, help="output of pip freeze")
    args = parser.parse_args()
    status = args.dpkg_status.read_text() if args.dpkg_status else sys.stdin.read()
    pip = args.pip.read_text() if args.pip else ""
    try:
        sbom = make_sbom(args.version, args.distribution, status, pip)
    except (ValueError, KeyError) as error:
        sys.exit(f"make_sbom.py: {error}")
    json.dump(sbom, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
