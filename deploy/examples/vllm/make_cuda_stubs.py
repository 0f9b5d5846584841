"""Stand-ins for the CUDA libraries that PyPI's torch is linked with, so that it loads without 2.7 GB of nvidia-* wheels on a
machine without a GPU. They hold the names that torch wants and nothing else; a CPU run calls none of them.

    python make_cuda_stubs.py SITE_PACKAGES/torch/lib
"""

import collections
import pathlib
import re
import subprocess
import sys
import tempfile

_CUDA = re.compile(r"^lib(cu|nccl|nv)")
_CUDA_NAME = re.compile(r"^(cu|nccl|nvrtc|nvshmem|nvJit)")
_DRIVER = "libcuda.so.1"  # torch opens it by itself, and only where there is one
# Libraries of names without a version, by the names' start; all others are the runtime's.
_UNVERSIONED = {
    "nvshmem": "libnvshmem_host.so.3",
    "nccl": "libnccl.so.2",
    "nvrtc": "libnvrtc.so.13",
    "cudnn": "libcudnn.so.9",
    "cusparseLt": "libcusparseLt.so.0",
    "cufft": "libcufft.so.12",
    "cuFile": "libcufile.so.0",
    "curand": "libcurand.so.10",
    "cusolver": "libcusolver.so.12",
    "cusparse": "libcusparse.so.12",
}
_RUNTIME = "libcudart.so.13"


def readelf(option, path):
    return subprocess.run(["readelf", "-W", option, path], capture_output=True, text=True, check=True).stdout


def version_owners(path):
    """Library of each symbol version that a file needs."""
    owners, library = {}, None
    for line in readelf("-V", path).splitlines():
        if match := re.search(r"File: (\S+)", line):
            library = match[1]
        if (match := re.search(r"Name: (\S+)", line)) and library:
            owners[match[1]] = library
    return owners


def undefined_and_defined(path):
    """(name, version, is weak) that are missing, and names that are there."""
    undefined, defined = [], set()
    for fields in map(str.split, readelf("--dyn-syms", path).splitlines()):
        if len(fields) < 8:
            continue
        name, _, version = fields[7].partition("@")
        if fields[6] == "UND":
            undefined.append((name, version.strip("@"), fields[4] == "WEAK"))
        else:
            defined.add(name)
    return undefined, defined


def wanted_symbols(folder):
    """{library: {version or None: names}} of the CUDA libraries that are not in the folder."""
    files = sorted(folder.glob("*.so*"))
    present = {path.name for path in files}
    libraries = {name for path in files for name in re.findall(r"NEEDED.*\[(.*?)\]", readelf("-d", path))}
    libraries = {name for name in libraries if _CUDA.match(name)} - present - {_DRIVER}
    wanted = {name: collections.defaultdict(set) for name in libraries}
    unversioned, defined = set(), set()
    for path in files:
        owners = version_owners(path)
        undefined, own = undefined_and_defined(path)
        defined |= own
        for name, version, weak in undefined:
            if owners.get(version) in wanted:
                wanted[owners[version]][version].add(name)
            elif not version and not weak and _CUDA_NAME.match(name):
                unversioned.add(name)
    for name in unversioned - defined:
        library = next((file for start, file in _UNVERSIONED.items() if name.startswith(start)), _RUNTIME)
        wanted.setdefault(library, collections.defaultdict(set))[None].add(name)
    return wanted


def build(library, versions, folder):
    names = dict.fromkeys(name for group in versions.values() for name in sorted(group))
    with tempfile.TemporaryDirectory() as scratch:
        source, script = pathlib.Path(scratch, "stub.c"), pathlib.Path(scratch, "stub.map")
        source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in names) + "\n")
        nodes = [f"{v} {{ global: {' '.join(f'{n};' for n in sorted(group))} }};" for v, group in versions.items() if v]
        script.write_text("\n".join(nodes) + "\n")
        options = ["-w", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{library}"]
        options += [f"-Wl,--version-script={script}"] if nodes else []
        subprocess.run(["gcc", *options, source, "-o", folder / library], check=True)


def main():
    folder = pathlib.Path(sys.argv[1])
    for library, versions in wanted_symbols(folder).items():
        build(library, versions, folder)


main()
